"""Unit tests of a completion's code: what runs them, and the programs of the two processes in which they run."""
