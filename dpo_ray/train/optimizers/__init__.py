"""The optimizers, and their state, which is carried from round to round."""
