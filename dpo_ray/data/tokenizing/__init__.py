"""Converts preference groups from text to token ids: chat templates in a sandbox, encoding, truncation."""
