"""The losses: pure functions of log-probs."""
