"""The groups of each optimizer step, packed for every rank. Pure and deterministic."""
