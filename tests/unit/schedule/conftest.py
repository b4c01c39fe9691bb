from __future__ import annotations

from hypothesis import settings

# Without a deadline: on a busy machine an example may take long. Without chance: a failure comes again.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")
