"""Stops Python code that runs too long, in any thread. Chat templates need this: they are programs that may never end."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

CHECK_SECONDS = 0.05
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class _OverTime(BaseException):
    """Raised by the watchdog in the watched thread. As a BaseException, it is not caught by `except Exception` there."""


class Watchdog:
    """A context manager whose method `run` limits the time of a call. One additional thread watches all calls.

    The time is the CPU time of the thread that entered the context, so that valid rows are not rejected only because the
    machine is busy. If the system cannot measure it, wall time is used. A single step within C code is not interrupted.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._deadline: float | None = None  # of the call that runs; guarded by the lock, as is `_raised`
        self._raised = False

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        self._cpu_clock = time.pthread_getcpuclockid(self._watched) if hasattr(time, "pthread_getcpuclockid") else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def run(self, call: Callable[[], T]) -> T:
        """Run `call` and return its result.

        Raises:
            TimeoutError: the call took longer than the limit.
        """
        try:
            with self._lock:
                self._deadline, self._raised = self._now() + self._limit, False
            try:
                return call()
            finally:
                self._end()
        except _OverTime:
            self._end()  # it may have been raised while the call was ending
            raise TimeoutError(f"took longer than {self._limit:g} s") from None

    def _end(self) -> None:
        with self._lock:  # from here on nothing is raised
            self._deadline = None
            if self._raised:  # cancels an exception that was raised but has not arrived yet
                _raise_in(ctypes.c_ulong(self._watched), None)
                self._raised = False

    def _now(self) -> float:
        return time.monotonic() if self._cpu_clock is None else time.clock_gettime(self._cpu_clock)

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_SECONDS):
            with self._lock:
                if self._deadline is not None and self._now() > self._deadline:
                    _raise_in(ctypes.c_ulong(self._watched), ctypes.py_object(_OverTime))
                    self._raised = True
                    self._deadline += 1.0  # raise it again later: a garbage collector callback may have swallowed it
