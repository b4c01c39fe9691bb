"""A process that copies the log of a driver to the run's storage as it grows, and ends after the driver.

It is a process of its own because the last lines of a driver that is killed, or that Ray's code ends, count most.

    python -m dpo_ray.run.copy_logs STORAGE SOURCE NAME [SOURCE NAME ...]

Each file SOURCE of this machine is copied to the file NAME of the storage. The driver holds the other end of standard
input, which closes when the driver ends.
"""

from __future__ import annotations

import select
import signal
import sys
import time
from pathlib import Path

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import DpoRayError

from .redact import secret_values, without_secrets

LOOK_SECONDS = 1.0
UPLOAD_SECONDS = 30.0  # an object store cannot append, so the whole file is written again
MAX_BYTES = 64 << 20  # of one file
CUT = b"... the log goes on, and is too long to be kept whole\n"


class Copy:
    """The copy of one growing file. Only whole lines are copied before the end, so that no secret is cut in two."""

    def __init__(self, storage: Storage, source: Path, name: str, secrets: list[str]) -> None:
        self._storage, self._name, self._secrets = storage, name, secrets
        self._stream = source.open("rb")  # stays readable after the driver has deleted the file
        self._rest = self._waiting = self._all = b""
        self._copied, self._uploaded = 0, 0.0

    def advance(self, *, is_last: bool = False) -> None:
        """Copy what was written since the last call. What the storage does not take now is kept for the next call.

        Raises:
            DpoRayError: the storage cannot be written.
        """
        lines, line_end, rest = (self._rest + self._stream.read()).rpartition(b"\n")
        new, self._rest = (lines + line_end + rest, b"") if is_last else (lines + line_end, rest)
        self._waiting += self._cut(without_secrets(new.decode(errors="replace"), self._secrets).encode())
        if not self._waiting:
            return
        if self._storage.is_local:
            self._storage.append(self._name, self._waiting)
        elif is_last or time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self._storage.write(self._name, self._all + self._waiting)
            self._all, self._uploaded = self._all + self._waiting, time.monotonic()
        else:
            return
        self._waiting = b""

    def _cut(self, new: bytes) -> bytes:
        room, self._copied = MAX_BYTES - self._copied, self._copied + len(new)
        if len(new) <= max(room, 0):
            return new
        return new[:room] + CUT if room > 0 else b""


def main(arguments: list[str]) -> None:
    """Copy until the driver ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray's job server sends it to all processes of a job
    storage, secrets = Storage(arguments[0]), secret_values()
    pairs = zip(arguments[1::2], arguments[2::2], strict=True)
    copies = [Copy(storage, Path(source), name, secrets) for source, name in pairs]
    is_last = False
    while not is_last:
        is_last = bool(select.select([sys.stdin], [], [], LOOK_SECONDS)[0])  # nothing is ever written to it
        for copy in copies:
            try:
                copy.advance(is_last=is_last)
            except (DpoRayError, OSError):  # the storage is away, which the driver itself reports
                continue


if __name__ == "__main__":
    main(sys.argv[1:])
