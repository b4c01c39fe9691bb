"""Set up a virtual environment from package indexes: checks, the environment, uv, the choice of torch, failures."""
