"""Reads data rows of many layouts as preference groups, whose prompts and completions are text or messages."""
