"""Measure a process together with all that it started: CPU seconds, and the memory that they hold."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import psutil

SAMPLE_SECONDS = 0.2
MIB = 1 << 20


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int | None = None) -> float:
    """Sum the CPU time of a process and its descendants, those that ended (and were waited for) included."""
    total = 0.0
    for process in _tree(pid or os.getpid()):
        try:
            t = process.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += t.user + t.system + t.children_user + t.children_system
    return total


@dataclass
class PeakMemory:
    """The largest sum of PSS (a shared page counts once, divided among its holders), in MiB, and what made it up."""

    mib: float = 0.0
    by_process_mib: dict[str, float] = field(default_factory=dict)
    shared_memory_mib: float = 0.0  # files in /dev/shm, Ray's object store among them, over what was there before
    samples: int = 0


class MemorySampler:
    """Watch a process and its descendants from a thread, every 0.2 s, until the block is left."""

    def __init__(self, pid: int, *, enabled: bool = True) -> None:
        self.peak = PeakMemory()
        self._enabled = enabled  # a watch costs CPU time: none where speed is measured
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._shared_before = _shared_memory_bytes()

    def __enter__(self) -> MemorySampler:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._enabled:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self._sample()
            self._stop.wait(max(0.0, SAMPLE_SECONDS - (time.monotonic() - began)))

    def _sample(self) -> None:
        held: dict[str, float] = defaultdict(float)
        for process in _tree(self._pid):
            try:
                held[_kind(process, self._pid)] += process.memory_full_info().pss / MIB
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue  # it ended between being listed and being looked at
        peak, total = self.peak, sum(held.values())
        peak.samples += 1
        peak.shared_memory_mib = max(peak.shared_memory_mib, (_shared_memory_bytes() - self._shared_before) / MIB)
        if total > peak.mib:
            peak.mib, peak.by_process_mib = total, dict(sorted(held.items(), key=lambda item: -item[1]))


def _kind(process: psutil.Process, root: int) -> str:
    """Name the part that a process plays in a local Ray."""
    if process.pid == root:
        return "driver"
    name = process.name()
    if name.startswith("ray::"):
        return "workers"
    return name if name in ("raylet", "gcs_server") else "Ray's helpers"


def _shared_memory_bytes() -> int:
    try:
        usage = os.statvfs("/dev/shm")  # noqa: S108 - it is measured, not written to
    except OSError:
        return 0
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize
