"""Align a language model with preference data, on Ray: from a laptop to a multi-node GPU cluster."""

__version__ = "0.1.0"
