"""Outputs of live training metrics: always metrics.jsonl, and the trackers that the recipe names."""

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

from .progress import Bar

logger = logging.getLogger(__name__)
MOST_PENDING_CALLS = 10_000  # by which a tracker may be behind training
CLOSE_SECONDS = 30.0  # that a tracker may take to write what it still holds

Row = dict[str, float]  # `step`, and the metrics of that step by name


class Tracker(Protocol):
    """Shows the metrics of a run somewhere else. It is created by the driver, once for each run."""

    def begin(self, known: Sequence[Row]) -> None:
        """Show exactly these rows, which are those of the checkpoint from which training resumes."""
        ...

    def write(self, row: Row) -> None:
        """Show the metrics of one more step."""
        ...

    def close(self) -> None:
        """Write pending data and release all resources."""
        ...


class TensorBoard:
    """TensorBoard's event files in the run's directory; nothing is written if that is not a local directory."""

    def __init__(self, run_dir: Storage) -> None:
        self._run_dir = run_dir
        self._writer: Any = None

    def begin(self, known: Sequence[Row]) -> None:
        if not self._run_dir.is_local:
            return
        from tensorboardX import SummaryWriter

        self.close()
        directory, suffix = self._run_dir.local_path("tensorboard"), f".{time.time_ns()}"
        make_dirs(directory)
        self._writer = SummaryWriter(
            str(directory),
            purge_step=0,  # TensorBoard hides the rows of previous attempts: all rows are written again
            filename_suffix=suffix,  # else two files of the same second would overwrite each other
        )
        for file in directory.glob(f"*{suffix}"):
            make_private(file)
        for row in known:
            self.write(row)

    def write(self, row: Row) -> None:
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


_BUILT_IN: dict[str, Callable[[Storage], Tracker]] = {"tensorboard": TensorBoard}
TRACKERS = _BUILT_IN | installed(ADDED, _BUILT_IN)
"""Constructors of trackers by their name in the recipe's `trackers`; each takes the run's directory."""


class _Background:
    """A tracker at work in a thread of its own: if it fails or hangs, training goes on without it."""

    def __init__(self, name: str, run_dir: Storage, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._work: queue.Queue[tuple[str, Any]] = queue.Queue(MOST_PENDING_CALLS)
        self._thread = threading.Thread(target=self._run, args=(run_dir,), name=f"tracker-{name}", daemon=True)
        self._failed = False
        self._thread.start()

    def call(self, method: str, *argument: Any) -> None:
        """Call a method of the tracker, after those that were called before; `close` waits for it."""
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
    """The live metrics of one run, written by its driver.

    On a disk, metrics.jsonl grows line by line; on an object store, which cannot append, it is written as a whole when
    training ends. The rows of a resumed run replace those of the same steps from before.
    """

    def __init__(self, run_dir: Storage, trackers: Sequence[str], say: Callable[[str], None] = logger.warning) -> None:
        self._run_dir = run_dir
        self._trackers = [_Background(name, run_dir, say) for name in trackers]
        self._rows: dict[int, Row] = {}

    def __enter__(self) -> MetricsSinks:
        return self

    def begin(self, known: Sequence[Row]) -> None:
        """Start with exactly the rows of the checkpoint from which training resumes. Call this before `write`.

        The rows of the checkpoint are complete. The existing file may lack the last rows before a crash, or belong to
        another recipe with the same name.
        """
        self._rows = {int(row["step"]): row for row in known}
        self._write_all()
        for tracker in self._trackers:
            tracker.call("begin", known)

    def write(self, row: Row) -> None:
        """Write one step's metrics."""
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
    """Show and write one row of training metrics; the first row of a worker contains the step at which it starts."""
    if "restored_step" in row:
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
    sinks.write(row)
    heldout = f", held-out accuracy {row['eval_rewards/accuracies']:.3f}" if "eval_rewards/accuracies" in row else ""
    shown = {"loss": ".4f", "rewards/margins": "+.3f", "rewards/accuracies": ".2f"}  # unpaired data has fewer
    names = {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    words = ", ".join(f"{names.get(n, n)} {row[n]:{form}}" for n, form in shown.items() if n in row)
    bar.advance(1, f"{words}{heldout}, {row['tokens_per_second']:,.0f} tokens/s")
