"""Which groups each optimizer step sees, packed for every rank. Pure and deterministic."""
