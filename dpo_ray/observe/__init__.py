"""What a run reports while it runs and at its end: progress, metrics and the model card."""
