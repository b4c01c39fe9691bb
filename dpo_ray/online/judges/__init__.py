"""The judges of online rounds: their questions, how each of them answers, and the memory of their answers."""
