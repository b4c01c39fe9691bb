"""How an installation ends early: with one line and an exit code."""

from __future__ import annotations

FAILED, INTERRUPTED = 1, 130


class Stop(Exception):
    """Carry the line that tells what is wrong, where, and what to do."""

    def __init__(self, line: str, code: int = FAILED) -> None:
        super().__init__(line)
        self.line = line
        self.code = code
