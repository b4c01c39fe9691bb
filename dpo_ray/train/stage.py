"""The stage `train`: Ray Train runs the workers, and the driver collects their metrics and commits the policy."""

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
from dpo_ray.cluster.resources import Resources
from dpo_ray.cluster.workers import run_workers
from dpo_ray.errors import DpoRayError, StoppedError

from .task import TrainTask

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5


def train_worker(settings: dict[str, TrainTask]) -> dict[str, Any]:
    """Run one training process; return its result (`worker.train_and_export`).

    The import of `worker` is inside the function, because `worker` imports torch and transformers, which takes seconds.
    Ray's controller also unpickles this function, but needs neither of the two libraries.
    """
    from .worker import train_and_export

    return train_and_export(settings["task"])


def run(
    task: TrainTask,
    request: Resources,
    on_row: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = logger.warning,
    may_start: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run training to the end and return the result of rank 0.

    Args:
        request: what each worker requests from Ray.
        on_row: called in this process with every row of metrics.
        say: called with a line about lost workers or about missing resources.
        may_start: called before workers start; raises an error if another driver has taken over the run.

    Raises:
        TrainError: the workers failed more often than train.max_failures allows.
        AuditError, TrainError: raised by the workers.
        StoppedError: SIGTERM was received. If possible, the workers wrote a checkpoint after their current step.
    """
    stopping = threading.Event()
    with _sigterm(stopping), _following(task.inbox, on_row, stopping):
        try:
            result = run_workers(
                train_worker,
                task,
                task.config,
                request,
                name=task.staging.attempt,
                where="train",
                goes_on="from the newest checkpoint",
                say=say,
                pause=task.inbox.pause.remote,
                gives_up=stopping.is_set,
                may_start=may_start,
            )
        except (DpoRayError, ray.exceptions.RayError) as error:
            if stopping.is_set():  # the workers or Ray itself received the signal as well
                raise _stopped(f"before the workers had written a checkpoint ({type(error).__name__})") from error
            raise
    if stopping.is_set() and "error" not in result:
        raise _stopped("as training ended")
    assert isinstance(result, dict)  # noqa: S101 - what train_worker returns
    if "error" in result:
        raise result["error"]
    return result


def commit(task: TrainTask, account: dict[str, Any], card: str, provenance: Provenance) -> Artifact:
    """Commit the artifact `train` (policy, model card, metrics and held-out table), then delete the checkpoints.

    Args:
        account: the result of rank 0 (`run`).
        card: text of the model card.
    """
    entries = [*account["entries"], task.staging.write("policy/README.md", card.encode())]
    figures = {name: account[name] for name in ("audit", "steps", "num_tokens", "final", "final_evaluation")}
    artifact = provenance.commit(task.staging, entries, rows={"steps": account["steps"]}, figures=figures)
    task.checkpoints.delete_tree()
    return artifact


@contextmanager
def _sigterm(stopping: threading.Event) -> Iterator[None]:
    """Handle SIGTERM in the `with` block: the first SIGTERM sets the event `stopping`, a second one ends the process.

    Ray's own handler would exit at the first SIGTERM. Outside of the main thread, no handler is set: the calling program
    then handles signals itself.
    """
    if threading.current_thread() is not threading.main_thread():  # the calling program handles signals itself
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
    fix = "run the same command again: it resumes from the newest checkpoint"
    return StoppedError(f"stopped by SIGTERM {when}", where="train", fix=fix)


class _following:
    """Context manager that takes rows of metrics from the inbox, in a thread, while training runs and once at its end.

    When the event `stopping` is set, the thread sends the workers a request to stop.
    """

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
        is_sent = False
        while not self._stop.wait(POLL_SECONDS):
            if self._stopping.is_set() and not is_sent:
                self._inbox.stop.remote()
                is_sent = True
            if not self._lost:
                self._drain()

    def _drain(self) -> None:
        try:
            for row in ray.get(self._inbox.take.remote()):
                self._on_row(row)
        except (ray.exceptions.RayError, OSError, DpoRayError) as error:
            self._lost = True  # training continues, and its metrics are stored with the checkpoints
            logger.warning("live metrics are no longer available: %s", error)
