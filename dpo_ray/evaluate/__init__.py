"""Evaluation of a trained policy on held-out data: figures, win rates, and the stage `evaluate`."""
