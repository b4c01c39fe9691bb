"""Bad rows (rows.jsonl) and bad shards (shards.py), each with the stable reason that it must be given."""
