"""The command line, with one module for each kind of command. A command is only a few lines that call one function."""
