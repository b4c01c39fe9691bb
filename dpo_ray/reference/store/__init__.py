"""The reference store: log-probs, found by a hash of the model and the token ids, in files that are never changed."""
