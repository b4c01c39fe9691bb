"""Submit a recipe as a Ray job, follow its log, stop it."""
