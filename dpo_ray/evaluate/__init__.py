"""What a finished policy does on held-out data."""
