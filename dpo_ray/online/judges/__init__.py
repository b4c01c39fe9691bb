"""The judges of online rounds: what they are asked, how each answers, and the memory of what they said."""
