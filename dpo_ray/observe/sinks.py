"""Outputs of live training metrics: the file metrics.jsonl, and the trackers in the recipe, such as TensorBoard."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import Any, Protocol

from dpo_ray.artifacts.disk import make_dirs, make_private
from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.extension import TRACKERS as ADDED
from dpo_ray.config.extension import installed
from dpo_ray.errors import DpoRayError

from .metrics import TRAIN_NOT_FINITE, TRAIN_STARTS
from .progress import Bar
from .recorder import count, record_row

logger = logging.getLogger(__name__)
MOST_PENDING_CALLS = 10_000  # a tracker that is further behind training is stopped
FLUSH_SECONDS = 30.0  # longest time until TensorBoard shows a row
CLOSE_SECONDS = 30.0  # time that a tracker has at the end to write its pending data

Row = dict[str, float]  # `step`, and the metrics of that step by name


class Tracker(Protocol):
    """Shows the metrics of a run in another program, such as TensorBoard. The driver creates it once for each run."""

    def begin(self, known: Sequence[Row]) -> None:
        """Replace all rows by the rows `known`; training continues after the last of these rows."""
        ...

    def write(self, row: Row) -> None:
        """Add the metrics of one more step."""
        ...

    def close(self) -> None:
        """Write pending data and release all resources."""
        ...


class TensorBoard:
    """Writes TensorBoard's event files into the run's directory, or nothing if this directory is not on a local disk.

    tensorboardX's `SummaryWriter` is not used: it writes in a thread of its own, and prints a traceback if a disk is full.
    """

    def __init__(self, run_dir: Storage) -> None:
        self._run_dir = run_dir
        self._writer: Any = None
        self._flushed_seconds = 0.0

    def begin(self, known: Sequence[Row]) -> None:
        if not self._run_dir.is_local:
            return
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self.close()
        directory, suffix = self._run_dir.local_path("tensorboard"), f".{time.time_ns()}"
        make_dirs(directory)
        # The suffix: else two files of the same second would overwrite each other.
        self._writer = EventsWriter(str(directory / "events"), suffix)
        for file in directory.glob(f"*{suffix}"):
            make_private(file)
        # TensorBoard hides the rows of previous attempts from step 0 on: all rows are written again.
        self._add(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        for row in known:
            self.write(row)

    def write(self, row: Row) -> None:
        if self._writer is None:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        for name, value in row.items():
            if name != "step":
                self._add(Event(step=int(row["step"]), summary=scalar(name, value)))
        if time.monotonic() - self._flushed_seconds >= FLUSH_SECONDS:
            self._writer.flush()
            self._flushed_seconds = time.monotonic()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


_BUILT_IN: dict[str, Callable[[Storage], Tracker]] = {"tensorboard": TensorBoard}
TRACKERS = _BUILT_IN | installed(ADDED, _BUILT_IN)
"""The constructor of each tracker, by the tracker's name in the recipe. It is called with the run's directory."""


class _Background:
    """Runs a tracker in a thread of its own. If the tracker fails or hangs, training continues without it."""

    def __init__(self, name: str, run_dir: Storage, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._work: queue.Queue[tuple[str, Any]] = queue.Queue(MOST_PENDING_CALLS)
        self._thread = threading.Thread(target=self._run, args=(run_dir,), name=f"tracker-{name}", daemon=True)
        self._failed = False
        self._thread.start()

    def call(self, method: str, *argument: Any) -> None:
        """Queue a call of one of the tracker's methods. After `close`, wait until the thread ends, but not too long."""
        if self._failed:
            return
        try:
            self._work.put_nowait((method, argument))
        except queue.Full:
            self._fail(f"it is {MOST_PENDING_CALLS:,} calls behind")
        if method == "close":
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._fail(f"it did not end within {CLOSE_SECONDS:g} s")

    def _run(self, run_dir: Storage) -> None:
        try:
            tracker = TRACKERS[self._name](run_dir)
            while True:
                method, argument = self._work.get()
                getattr(tracker, method)(*argument)
                if method == "close":
                    return
        except Exception as error:  # a tracker is somebody else's code, and the network is behind many
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(f"the tracker {self._name} stopped, and the run goes on without it: {why}"[:500])


class MetricsSinks:
    """Context manager in the driver that writes the live metrics of one run to metrics.jsonl and to the trackers.

    On a disk, metrics.jsonl grows line by line. An object store cannot append, so the file is written there when
    training begins and ends. If training resumes and repeats a step, the new row replaces the old row of that step.
    """

    def __init__(self, run_dir: Storage, trackers: Sequence[str], say: Callable[[str], None] = logger.warning) -> None:
        self._run_dir = run_dir
        self._trackers = [_Background(name, run_dir, say) for name in trackers]
        self._rows: dict[int, Row] = {}

    def __enter__(self) -> MetricsSinks:
        return self

    def begin(self, known: Sequence[Row]) -> None:
        """Replace all rows by the rows `known`. Call this before `write`.

        Args:
            known: all rows until the checkpoint from which training resumes. They come from the checkpoint, because the
                file may lack the last rows before a crash, or belong to another recipe with the same name.
        """
        self._rows = {int(row["step"]): row for row in known}
        self._write_all()
        for tracker in self._trackers:
            tracker.call("begin", known)

    def write(self, row: Row) -> None:
        """Write the metrics of one step to all outputs."""
        self._rows[int(row["step"])] = row
        if self._run_dir.is_local:
            self._run_dir.append("metrics.jsonl", f"{json.dumps(row)}\n".encode())
        for tracker in self._trackers:
            tracker.call("write", row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.call("close")
        if self._rows:
            with suppress(DpoRayError) if error is not None else nullcontext():  # the first error is the cause
                self._write_all()

    def _write_all(self) -> None:
        self._run_dir.write(
            "metrics.jsonl", "".join(json.dumps(self._rows[s]) + "\n" for s in sorted(self._rows)).encode()
        )


def follow(sinks: MetricsSinks, bar: Bar, row: dict[str, Any]) -> None:
    """Handle one row from the training workers: write its metrics, record them, and show them in the progress bar.

    Three kinds of rows are not metrics. The first row of every attempt (`restored_step`) tells at which step training
    starts. A row `waiting_for` tells that training waits for reference log-probs. A row `not_finite_step` tells that
    training ends with an error.
    """
    if "restored_step" in row:
        count(TRAIN_STARTS)
        sinks.begin(row["known"])
        bar.begin_at(row["restored_step"])
        if row["restored_step"]:
            bar.say(f"resuming from the checkpoint of step {row['restored_step']:.0f}")
        return
    if "waiting_for" in row:
        what = (
            f"step {row['step']:.0f}" if row["waiting_for"] == "train" else f"the held-out data `{row['waiting_for']}`"
        )
        bar.say(f"training waits until {what} is scored")
        return
    if "not_finite_step" in row:
        count(TRAIN_NOT_FINITE)
        return
    record_row(row)
    sinks.write(row)
    heldout = f", held-out accuracy {row['eval_rewards/accuracies']:.3f}" if "eval_rewards/accuracies" in row else ""
    shown = {"loss": ".4f", "rewards/margins": "+.3f", "rewards/accuracies": ".2f"}  # unpaired data has fewer
    names = {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    words = ", ".join(f"{names.get(n, n)} {row[n]:{form}}" for n, form in shown.items() if n in row)
    bar.advance(1, f"{words}{heldout}, {row['tokens_per_second']:,.0f} tokens/s")
