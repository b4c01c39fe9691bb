"""The optimizers, and their state that is carried from round to round."""
