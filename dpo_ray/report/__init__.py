"""The HTML pages that report on a run, its data and its online rounds: gathering their contents, and rendering them."""
