"""From preference data in any shape to token ids, with an account of every row."""
