"""The current values of a run's metrics, which one process records and exports: the driver.

All figures pass through the driver: rows of training, the state of the engine pool, rounds, lease. So a worker that is
replaced leaves no second series behind, and a training step costs nothing more.

`record` and `count` may be called anywhere, from any thread. Outside of the `recording` context they do nothing. They
never raise an error, and never wait for the network.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from .metrics import ROW_METRICS, Metric

logger = logging.getLogger(__name__)
REPEAT_SECONDS = 1.0  # Ray forgets a gauge that is not set again within two of its reports; its shortest period is 1 s
CLOSE_SECONDS = 5.0

Labels = Mapping[str, str]


class Exporter(Protocol):
    """Passes values on to a system of metrics."""

    def set(self, metric: Metric, value: float, labels: Labels) -> None:
        """Set a gauge."""
        ...

    def add(self, metric: Metric, amount: float, labels: Labels) -> None:
        """Increase a counter by `amount`, which is above 0."""
        ...


class _Recorder:
    """The gauges of one run. A thread sets them again every second, after a call of `look`, which may record more."""

    def __init__(self, run: str, exporter: Exporter, look: Callable[[], None]) -> None:
        self._run, self._exporter, self._look = run, exporter, look
        self._gauges: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._failed = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join(CLOSE_SECONDS)

    def record(self, metric: Metric, value: float, labels: Labels) -> None:
        self._safely(lambda: self._set(metric, value, {"run": self._run, **labels}))

    def count(self, metric: Metric, amount: float, labels: Labels) -> None:
        if amount:
            self._safely(lambda: self._exporter.add(metric, amount, {"run": self._run, **labels}))

    def _set(self, metric: Metric, value: float, labels: Labels) -> None:
        key = metric, tuple(labels.items())
        with self._lock:
            if not math.isfinite(value):  # Ray does not export it, and the value before it is no longer true
                self._gauges.pop(key, None)
                return
            self._gauges[key] = value
            self._exporter.set(metric, value, labels)

    def _repeat(self) -> None:
        while not self._end.wait(REPEAT_SECONDS) and not self._failed:
            self._safely(self._look)
            self._safely(self._set_again)

    def _set_again(self) -> None:
        with self._lock:  # so that no old value is set after a newer one
            for (metric, labels), value in self._gauges.items():
                self._exporter.set(metric, value, dict(labels))

    def _safely(self, call: Callable[[], None]) -> None:
        """Make a call. If it fails, make no further calls: metrics never stop a run."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            logger.warning("metrics are no longer exported, and the run goes on without them: %s", error)


_current: _Recorder | None = None


@contextmanager
def recording(run: str, exporter: Exporter, look: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Export what is recorded inside the `with` block, in any thread of this process, as metrics of the run `run`.

    Args:
        look: called every second, in another thread, to record values that nobody reports.
    """
    global _current
    before, _current = _current, _Recorder(run, exporter, look)
    _current.start()
    try:
        yield
    finally:
        _current.close()
        _current = before


def record(metric: Metric, value: float, **labels: str) -> None:
    """Set a gauge to a value. If the value is not finite, the gauge is no longer exported."""
    if _current is not None:
        _current.record(metric, value, labels)


def count(metric: Metric, amount: float = 1.0, **labels: str) -> None:
    """Increase a counter. An amount of 0 changes nothing."""
    if _current is not None:
        _current.count(metric, amount, labels)


def record_row(row: Mapping[str, float]) -> None:
    """Record one row of metrics.jsonl. Columns that are not in the row keep their last values."""
    for metric in ROW_METRICS:
        if metric.column in row:
            record(metric, row[metric.column] * metric.factor)
