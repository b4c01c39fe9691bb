"""Loads causal language models, adapts and shards them, and computes the log-probs of completion tokens with them."""
