"""The memory limit under which this process runs, and how many processes the kernel has killed at that limit.

A container, and so a pod, has a control group of its own. Both versions of control groups are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MOUNT, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED_BYTES = 1 << 60  # version 1 has no word for it, but a number above this one
_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class MemoryLimit:
    """A memory limit, and the number of processes that the kernel has killed because of it."""

    bytes: int
    kills: int


def memory_limit(mount: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> MemoryLimit | None:
    """Return the memory limit of this process's control group, or of the nearest one around it; None: no limit."""
    for root, path, limit_file, kills_file in _places(mount, own_groups):
        group = root / path.lstrip("/")
        for directory in (group, *group.parents) if group.is_dir() else (root,):
            limit = _read(directory / limit_file)
            if limit.isdecimal() and int(limit) < UNLIMITED_BYTES:
                kills = _KILLS.search(_read(directory / kills_file))
                return MemoryLimit(int(limit), int(kills[1]) if kills else 0)
            if directory == root:
                break
    return None


def _places(mount: Path, own_groups: Path) -> list[tuple[Path, str, str, str]]:
    """Return where a memory limit may be, as (root, path of the own group, name of the limit, name of the counter)."""
    lines = [line.split(":", 2) for line in _read(own_groups).splitlines() if line.count(":") >= 2]
    second = next((path for number, _, path in lines if number == "0"), "/")
    first = next((path for _, controllers, path in lines if "memory" in controllers.split(",")), "/")
    return [
        (mount, second, "memory.max", "memory.events"),
        (mount / "memory", first, "memory.limit_in_bytes", "memory.oom_control"),
    ]


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
