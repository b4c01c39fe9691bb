"""Limits that a process sets for itself before it runs foreign code. Both programs of this folder contain this code."""

from __future__ import annotations

import resource


def limit_resources(cpu_seconds: int, size_bytes: int) -> None:
    """Limit this process's CPU time, its address space, and the size of each file that it writes. Forbid core dumps."""
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, size_bytes),
        (resource.RLIMIT_FSIZE, size_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
