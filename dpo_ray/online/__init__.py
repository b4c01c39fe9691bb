"""Sampling from policies, and the rounds built on it."""
