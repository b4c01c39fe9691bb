"""The losses, as pure functions of log-probs."""
