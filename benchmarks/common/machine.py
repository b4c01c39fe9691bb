"""Describe the machine on which a number was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine(cores: int) -> str:
    """Describe the machine in a few words."""
    info = Path("/proc/cpuinfo")
    told = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in told if "model name" in line), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{cores} of {os.cpu_count()} cores, {model}, {memory:.0f} GiB; load {os.getloadavg()[0]:.1f} at the end"
