"""The planner: does a recipe fit on a cluster, how long does it take, and what would change that."""
