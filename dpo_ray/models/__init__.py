"""Causal language models as functions from packed rows to token log-probs: loading, adapters, attention, sharding."""
