"""Sides of a benchmark that take turns: each is a process that waits, measures one task when told to, and waits again.

A machine's speed drifts by more than what is to be measured. So the sides stay up, and work on the same small tasks one
right after the other; a side that waits takes no CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

Answer = dict[str, Any]


class Side:
    """A process that answers tasks; ends with the block."""

    def __init__(self, name: str, command: Sequence[str | Path], log: IO[bytes]) -> None:
        self.name, self._log = name, log
        self._process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )

    def __enter__(self) -> Side:
        self.about = self._read()  # it is ready
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def ask(self, task: Any) -> Answer:
        """Run one task, and return its measurements.

        Raises:
            SystemExit: the process ended; what it said is in the log.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed; see {self._log.name}")
        return json.loads(line)


def answer_tasks(about: Answer, work: Callable[[Any], Answer]) -> None:
    """Be a side: say that it is ready, then do the tasks that come on standard input until it ends.

    Only answers reach standard output: libraries that print there would break the talk.
    """
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(about), file=talk, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=talk, flush=True)
