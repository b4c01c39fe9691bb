"""Recipes as Ray jobs: submitting a recipe, following the log of its job, and stopping the job."""
