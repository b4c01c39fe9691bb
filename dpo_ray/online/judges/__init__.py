"""The judges of online rounds, which score sampled completions. Their answers are stored and never asked for twice."""
