"""Preference optimisation under FSDP2: the step, the loop, checkpoints, and the stage that runs on Ray Train."""
