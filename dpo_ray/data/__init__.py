"""Converts preference data of many layouts to token ids. Every input row is either admitted or counted with a reason."""
