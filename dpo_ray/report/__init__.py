"""The HTML pages of a run, its data and its rounds: gathering of their figures, and rendering."""
