"""The reports of a run: its progress, its live metrics, and the model card of the finished policy."""
