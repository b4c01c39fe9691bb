"""The judges of online rounds, which score sampled completions. Stored answers are not requested again."""
