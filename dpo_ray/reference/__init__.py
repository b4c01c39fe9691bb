"""The frozen reference model's log-probs: scored, stored by content, joined by key, audited."""
