"""Call a function in a fresh process and say what it took: processor time, which other programs do not stretch, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What one call took, beyond what its process held before."""

    cpu_seconds: float  # of all its threads
    peak_bytes: int
    result: Any  # what it returned


def cost_of(make: Callable[..., Callable[[], Any]], *args: Any) -> Cost:
    """Call `make(*args)` in a fresh process, then measure a call of the function that it returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, make, args).result()


def _measured(make: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> Cost:
    call = make(*args)
    before_bytes = _memory_bytes("VmRSS")
    CLEAR.write_text("5")  # the high-water mark begins anew
    began = time.process_time()
    result = call()
    return Cost(time.process_time() - began, _memory_bytes("VmHWM") - before_bytes, result)


def own_peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    return _memory_bytes("VmHWM")


def _memory_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
