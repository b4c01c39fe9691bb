"""Unit tests of code that a completion contains. They run in two processes; this folder has the programs of both."""
