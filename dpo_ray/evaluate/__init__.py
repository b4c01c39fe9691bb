"""Evaluation of a trained policy on held-out data: metrics, win rates, and the stage `evaluate`."""
