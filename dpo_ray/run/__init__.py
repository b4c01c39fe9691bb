"""A run and the code that drives it: the plan, the checks before work begins, and the stages in order."""
