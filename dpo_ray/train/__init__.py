"""Training of the policy with FSDP2: one optimizer step, the loop over all steps, checkpoints, the stage `train`."""
