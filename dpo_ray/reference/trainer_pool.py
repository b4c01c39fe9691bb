"""Scoring by training workers: a Ray Train run in which every rank holds its shard of the model, without gradients.

This module must import quickly, because Ray's controller imports it too. So torch is imported only in the workers.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from dpo_ray.cluster.resources import Resources
from dpo_ray.cluster.workers import run_workers, start_inbox
from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import ConfigError
from dpo_ray.reference.store.store import ReferenceStore

from .granule import Scored
from .scorer import ScorerSettings

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ScoringTask:
    """All inputs of a scoring worker. Can be pickled."""

    settings: ScorerSettings
    store: ReferenceStore
    train: TrainConfig
    cpus: float  # of each worker
    granules: tuple[ray.ObjectRef, ...]
    known: tuple[str, ...]  # segments (files) of the store that contain no completion of the granules
    inbox: Any  # handle of the driver's inbox, which receives a Scored for each granule


def score_with_trainer(
    settings: ScorerSettings,
    store: ReferenceStore,
    train: TrainConfig,
    granules: Sequence[ray.ObjectRef],
    request: Resources,
    say: Callable[[str], None] = logger.warning,
) -> Generator[Scored, None, None]:
    """Score granules on `train.workers` training workers. Yield the result of each granule once, when it is ready.

    When a result is yielded, the log-probs of its granule are in the store. If a worker dies, all workers start again
    and score what the store still lacks, so only the current granule is computed again. If there are no granules, no
    worker is started. If the caller closes this generator early, the workers end after their current granule.

    Args:
        request: the resources that each worker requests from Ray.
        granules: references to tables of schema GRANULE, with completions that the store lacks.
        say: called with messages about lost workers and missing resources.

    Raises:
        TrainError: the workers died more often than train.max_failures allows.
        ConfigError, ArtifactError: raised by the workers.
    """
    if not granules:
        return
    inbox, unwanted = start_inbox(), threading.Event()
    task = ScoringTask(settings, store, train, request.cpus, tuple(granules), tuple(store.segments()), inbox)
    run = _in_background(task, request, say, unwanted)
    yielded: set[int] = set()
    try:
        ended = False
        while not ended:
            ended = bool(wait([run], POLL_SECONDS).done)
            for scored in ray.get(inbox.take.remote()):
                if scored.granule not in yielded:  # restarted workers report finished granules again
                    yielded.add(scored.granule)
                    yield scored
        if (error := run.result()) is not None:
            raise error
        assert len(yielded) == len(granules)  # noqa: S101
    finally:
        unwanted.set()
        ray.kill(inbox)  # tells workers that are still scoring that nobody needs the results


def _in_background(
    task: ScoringTask, request: Resources, say: Callable[[str], None], unwanted: threading.Event
) -> Future[ConfigError | None]:
    """Run the workers from a new thread, because the main thread of the driver reads their results at the same time.

    Return a future for the result of `score_worker`.
    """
    future: Future[ConfigError | None] = Future()

    def run() -> None:
        try:
            result = run_workers(
                score_worker,
                task,
                task.train,
                request,
                name=f"reference-{uuid.uuid4().hex[:12]}",
                where="reference",
                goes_on="with the completions that the store lacks",
                say=say,
                gives_up=unwanted.is_set,
            )
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="score-with-trainer", daemon=True).start()
    return future


def score_worker(settings: dict[str, ScoringTask]) -> ConfigError | None:
    """Run one scoring process.

    If the model cannot be loaded, return the error, because all ranks get the same error and a restart would not help.
    Otherwise return None.
    """
    import torch
    from ray.train.torch import get_device

    from .trainer_scorer import TrainerScorer, score_granules

    task = settings["task"]
    torch.set_num_threads(max(1, int(task.cpus)))
    try:
        scorer = TrainerScorer(task.settings, task.train, get_device())
    except ConfigError as error:
        return error

    def report(scored: Scored) -> bool:
        try:
            ray.get(task.inbox.put.remote(scored))
        except ray.exceptions.RayActorError:
            return False
        return True

    score_granules(scorer, task.store, task.known, (ray.get(ref) for ref in task.granules), report)
    return None
