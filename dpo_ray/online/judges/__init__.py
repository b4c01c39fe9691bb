"""The judges of online rounds, which score sampled completions: one file per kind of judge, and stored answers."""
