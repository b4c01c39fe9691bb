"""The conversion of a group of texts to token ids: chat templates in a sandbox, encoding, truncation."""
