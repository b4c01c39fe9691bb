"""Rows, in any of the layouts that people have, as preference groups of text or messages."""
