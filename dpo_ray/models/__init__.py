"""Causal language models as the maths sees them: packed rows in, token log-probs out."""
