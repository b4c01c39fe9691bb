"""Preference optimisation under FSDP2: step, loop, checkpoints, and the Ray Train stage."""
