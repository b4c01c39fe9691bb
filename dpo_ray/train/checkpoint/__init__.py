"""Sharded checkpoints: written asynchronously, hashed, committed by a manifest, verified when read."""
