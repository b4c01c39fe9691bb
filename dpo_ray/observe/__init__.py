"""What a run says: progress, metrics, report."""
