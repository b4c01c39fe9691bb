"""The code that drives a run: its plan, the checks before any work begins, and the stages in order."""
