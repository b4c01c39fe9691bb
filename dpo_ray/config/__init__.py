"""The recipe, as pydantic models; this package imports neither torch nor ray."""
