"""The stage `train`: Ray Train runs the workers; the driver follows their metrics and commits the policy."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.cluster.workers import run_workers
from dpo_ray.errors import DpoRayError, StoppedError

from .task import TrainTask

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5


def train_worker(settings: dict[str, TrainTask]) -> dict[str, Any]:
    """Run one training process.

    What it needs is imported here, in the process that needs it: torch and transformers take seconds, and Ray's controller
    unpickles this function as well.
    """
    from .worker import train_and_export

    return train_and_export(settings["task"])


def run(
    task: TrainTask,
    gpus_per_worker: float,
    on_row: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = logger.warning,
) -> dict[str, Any]:
    """Train to the end and return rank 0's account.

    Args:
        on_row: is called on this side with every row of metrics.
        say: is told of workers that were lost, and of what is waited for.

    Raises:
        TrainError: the workers failed more often than train.max_failures allows.
        AuditError, TrainError: as the workers found.
        StoppedError: SIGTERM came. The workers have made a checkpoint after the step that they were at, if they still could.
    """
    stopping = threading.Event()
    with _sigterm(stopping), _following(task.inbox, on_row, stopping):
        try:
            account = run_workers(
                train_worker,
                task,
                task.config,
                gpus_per_worker,
                name=task.staging.attempt,
                where="train",
                goes_on="from the newest checkpoint",
                say=say,
                pause=task.inbox.pause.remote,
                gives_up=stopping.is_set,
            )
        except (DpoRayError, ray.exceptions.RayError) as error:
            if stopping.is_set():  # the signal came to the workers or to Ray itself as well
                raise _stopped(f"before the workers had made a checkpoint ({type(error).__name__})") from error
            raise
    if stopping.is_set() and "error" not in account:
        raise _stopped("as training ended")
    assert isinstance(account, dict)  # noqa: S101 - what train_worker returns
    if "error" in account:
        raise account["error"]
    return account


def commit(task: TrainTask, account: dict[str, Any], card: str, provenance: Provenance) -> Artifact:
    """Commit the policy, its model card, metrics and held-out table; the checkpoints are then no longer needed."""
    entries = [*account["entries"], task.staging.write("policy/README.md", card.encode())]
    figures = {name: account[name] for name in ("audit", "steps", "num_tokens", "final", "final_evaluation")}
    artifact = provenance.commit(task.staging, entries, rows={"steps": account["steps"]}, figures=figures)
    task.checkpoints.delete_tree()
    return artifact


@contextmanager
def _sigterm(stopping: threading.Event) -> Iterator[None]:
    """Set the event at the first SIGTERM, in place of what Ray does, which is to exit; the second ends the process."""
    if threading.current_thread() is not threading.main_thread():  # of a program that handles its signals itself
        yield
        return

    def note(*_: object) -> None:
        stopping.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(when: str) -> StoppedError:
    fix = "the same command goes on from the newest checkpoint"
    return StoppedError(f"stopped by SIGTERM {when}", where="train", fix=fix)


class _following:
    """Poll the inbox in a thread while training runs, and once more at the end; pass on the word to stop."""

    def __init__(self, inbox: Any, on_row: Callable[[dict[str, Any]], None], stopping: threading.Event) -> None:
        self._inbox, self._on_row, self._stopping = inbox, on_row, stopping
        self._stop = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._poll, name="metrics-inbox", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self._drain()

    def _poll(self) -> None:
        told = False
        while not self._stop.wait(POLL_SECONDS):
            if self._stopping.is_set() and not told:
                self._inbox.stop.remote()
                told = True
            if not self._lost:
                self._drain()

    def _drain(self) -> None:
        try:
            for row in ray.get(self._inbox.take.remote()):
                self._on_row(row)
        except (ray.exceptions.RayError, OSError, DpoRayError) as error:
            self._lost = True  # training goes on, and its metrics are safe with the checkpoints
            logger.warning("the live metrics stop here: %s", error)
