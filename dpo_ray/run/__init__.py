"""What a run is, and what drives it: the plan, the checks before work begins, the stages in order."""
