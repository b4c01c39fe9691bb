"""Limits that a process sets for itself before it runs code of others. This file is a part of both programs."""

from __future__ import annotations

import resource


def limit_resources(cpu_seconds: int, size_bytes: int) -> None:
    """Limit this process's CPU time, its address space and each file that it writes; it writes no core dump."""
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, size_bytes),
        (resource.RLIMIT_FSIZE, size_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
