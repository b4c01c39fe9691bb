"""The reference store: log-probs by the content of what was scored, in append-only segments."""
