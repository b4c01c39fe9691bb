"""Log-probs of the frozen reference model: how they are computed, stored, joined to the data, and audited."""
