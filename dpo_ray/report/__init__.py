"""The HTML pages that report on a run, its data and its online rounds: they gather figures and render them."""
