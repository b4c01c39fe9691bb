"""The stage `train`: Ray Train runs the workers; the driver follows their metrics and commits the policy."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.errors import DpoRayError, TrainError

from .task import MetricsInbox, TrainTask, train_worker

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5


def start_inbox() -> Any:
    """Start the inbox; it ends with the driver."""
    return ray.remote(MetricsInbox).options(num_cpus=0).remote()


def run(task: TrainTask, gpus_per_worker: float, on_row: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train to the end and return rank 0's account; `on_row` is called on this side with every row of metrics.

    Each call is a Ray Train run of its own, so Ray's own snapshot is never the truth: our checkpoints are.

    Raises:
        TrainError: the workers failed more often than train.max_failures allows.
        AuditError, TrainError: as the workers found.
    """
    resources = {"CPU": task.config.cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
    with (
        tempfile.TemporaryDirectory(prefix="dpo-ray-train-", ignore_cleanup_errors=True) as scratch,
        _following(task.inbox, on_row),
    ):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(
                num_workers=task.config.workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=task.staging.attempt,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=task.config.max_failures),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            cause = first_cause(error)
            if isinstance(cause, DpoRayError):
                raise cause from error
            raise TrainError(
                f"the workers failed: {type(cause).__name__}: {cause}",
                where="train",
                fix="mend the cause and run the same command: it goes on from the newest checkpoint; --verbose shows the workers' logs",
            ) from error
    account = result.return_value
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


def first_cause(error: ray.train.TrainingFailedError) -> BaseException:
    """Find what a worker raised, under the wrappings of Ray Train; a worker that died by itself has none."""
    failures = getattr(error, "worker_failures", {})
    cause = next(iter(failures.values()), error)
    return getattr(cause, "_base_exc", cause)


class _following:
    """Poll the inbox in a thread while training runs, and once more at the end."""

    def __init__(self, inbox: Any, on_row: Callable[[dict[str, Any]], None]) -> None:
        self._inbox, self._on_row = inbox, on_row
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
        while not self._stop.wait(POLL_SECONDS) and not self._lost:
            self._drain()

    def _drain(self) -> None:
        try:
            for row in ray.get(self._inbox.take.remote()):
                self._on_row(row)
        except (ray.exceptions.RayError, OSError, DpoRayError) as error:
            self._lost = True  # training goes on, and its metrics are safe with the checkpoints
            logger.warning("the live metrics stop here: %s", error)
