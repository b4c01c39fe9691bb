"""Recipes as Ray jobs: submitting one, following its log, stopping it."""
