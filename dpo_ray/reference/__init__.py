"""Log-probs of the frozen reference model: scoring, a store addressed by content, the join by key, and the audit."""
