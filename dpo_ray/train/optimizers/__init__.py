"""The optimizers, and how their state is passed from the training of one round to the next."""
