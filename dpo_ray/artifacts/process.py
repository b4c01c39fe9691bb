"""Tell one process from all others, and say whether it is surely gone."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process of some machine. A pid is used again; together with its start time and the boot it is not."""

    host: str
    boot: str  # the boot of the machine and the pid namespace; empty where the system does not tell
    pid: int
    started: str  # in the system's own ticks; empty where the system does not tell

    @classmethod
    def current(cls) -> Process:
        """Describe the calling process."""
        return cls(socket.gethostname(), _boot(), os.getpid(), _start_ticks(os.getpid()) or "")

    @classmethod
    def from_json(cls, value: Any) -> Process | None:
        """Read what `dataclasses.asdict` wrote, or return None where it is something else."""
        try:
            return cls(str(value["host"]), str(value["boot"]), int(value["pid"]), str(value["started"]))
        except (KeyError, TypeError, ValueError):
            return None

    def is_gone(self) -> bool:
        """Say True only where it is certain: a process of this boot whose pid is free or used again."""
        return self._is_of_this_machine() and _start_ticks(self.pid) != self.started

    def is_alive_here(self) -> bool:
        """Say True only where it is certain: a process of this boot that runs."""
        return self._is_of_this_machine() and _start_ticks(self.pid) == self.started

    def _is_of_this_machine(self) -> bool:
        return bool(self.boot and self.started) and (self.host, self.boot) == (socket.gethostname(), _boot())


def user_name() -> str:
    """Return the login name, or the numeric id where the container has no such user."""
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
    """Return when a process started, or None where it does not run; a zombie has ended already."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if fields[0] in "ZX" else fields[19]
