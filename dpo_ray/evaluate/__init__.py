"""Evaluation of a trained policy on held-out data."""
