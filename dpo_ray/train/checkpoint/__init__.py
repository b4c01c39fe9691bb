"""Sharded checkpoints: written in the background, committed by a manifest, and verified before they are read."""
