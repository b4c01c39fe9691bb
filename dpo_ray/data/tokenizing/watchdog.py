"""Stop Python code that runs too long, in whichever thread it runs: templates are programs, and may never end."""

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
    """Raised in the watched thread from outside; no `except Exception` of what it interrupts may keep it."""


class Watchdog:
    """Bound each call made in the thread that enters this context. Holds one thread, however many calls there are.

    Time is that of the thread's own CPU where the system tells it, so that a busy machine makes no sound row late;
    elsewhere it is the clock's. A single step within C code is not interrupted.
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
        """Return what `call` returns.

        Raises:
            TimeoutError: it took longer than the limit.
        """
        try:
            with self._lock:
                self._deadline, self._raised = self._now() + self._limit, False
            try:
                return call()
            finally:
                self._end()
        except _OverTime:
            self._end()  # where it came while the call was ending
            raise TimeoutError(f"took longer than {self._limit:g} s") from None

    def _end(self) -> None:
        with self._lock:  # from here on nothing is raised
            self._deadline = None
            if self._raised:  # and what was, but has not arrived, never does
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
                    self._deadline += 1.0  # a callback of the garbage collector may have swallowed it: once more
