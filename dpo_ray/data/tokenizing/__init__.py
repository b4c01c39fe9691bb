"""The conversion of a group of texts to token ids: chat templates in a process with limits, encoding, truncation."""
