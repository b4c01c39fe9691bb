"""Online training in rounds: a round samples completions, judges and pairs them, and trains the policy on the pairs."""
