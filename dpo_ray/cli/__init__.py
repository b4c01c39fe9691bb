"""The command line: a file for each kind of command, each command a few lines that call one function."""
