"""The capacity planner: whether a recipe fits on a cluster, how long it takes, and which changes would help."""
