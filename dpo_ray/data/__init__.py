"""Converts preference data of any shape to token ids, with an account of every row."""
