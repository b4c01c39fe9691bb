"""The pages of a run, its data and its rounds: what gathers their figures, and what draws them."""
