"""The command line: one module for each kind of command; each command is a few lines that call one function."""
