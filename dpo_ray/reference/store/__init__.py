"""The reference store: log-probs keyed by the content that was scored, in append-only segments."""
