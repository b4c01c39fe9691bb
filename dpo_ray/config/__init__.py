"""The recipe: pydantic models only; imports neither torch nor ray."""
