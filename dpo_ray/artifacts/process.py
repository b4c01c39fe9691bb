"""The identity of a process, and checks whether the process is running or has ended."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """The identity of a process on some machine. A pid may be reused, but pid, start time and boot together are unique."""

    host: str
    boot: str  # the boot of the machine and the pid namespace; empty if the system does not report it
    pid: int
    started: str  # in the system's own ticks; empty if the system does not report it

    @classmethod
    def current(cls) -> Process:
        """Return the identity of the calling process."""
        return cls(socket.gethostname(), _boot(), os.getpid(), _start_ticks(os.getpid()) or "")

    @classmethod
    def from_json(cls, value: Any) -> Process | None:
        """Build a Process from the output of `dataclasses.asdict`; return None if the value is something else."""
        try:
            return cls(str(value["host"]), str(value["boot"]), int(value["pid"]), str(value["started"]))
        except (KeyError, TypeError, ValueError):
            return None

    def is_gone(self) -> bool:
        """Return True only if it is certain that the process has ended.

        It is certain if the process ran on this machine since the last boot, and its pid is now free or reused.
        """
        return self._is_of_this_machine() and _start_ticks(self.pid) != self.started

    def is_alive_here(self) -> bool:
        """Return True only if it is certain that the process is running.

        It is certain if a process of this machine has the same boot, pid and start time.
        """
        return self._is_of_this_machine() and _start_ticks(self.pid) == self.started

    def _is_of_this_machine(self) -> bool:
        return bool(self.boot and self.started) and (self.host, self.boot) == (socket.gethostname(), _boot())


def user_name() -> str:
    """Return the user's login name, or the numeric user id if the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # containers share the boot but not the pids
    except OSError:
        return ""


def _start_ticks(pid: int) -> str | None:
    """Return the start time of a process, in the system's ticks; None if the process has ended (also as a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the process name before it may contain spaces and brackets
    return None if fields[0] in "ZX" else fields[19]
