"""The stages `reference`, `schedule` and `train` at the same time (`reference.mode: streaming`).

The artifacts are the same as with `reference.mode: ahead`, where these stages run one after the other. To score a
group means to compute its reference log-probs.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.markup import escape

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import read_table
from dpo_ray.cluster.workers import start_inbox
from dpo_ray.observe.progress import Bar
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.stage import ScoringTally
from dpo_ray.reference.streaming import InOrder, Stopped, UnscorableError
from dpo_ray.schedule.build import Packing
from dpo_ray.schedule.live import LiveSchedule
from dpo_ray.schedule.stage import SplitOrder, count_rows, order_splits
from dpo_ray.schedule.streaming_order import deal_turns
from dpo_ray.train.checkpoint.checkpoint import oldest_step

from . import stages
from .context import RunContext

S = TypeVar("S")
T = TypeVar("T")


def score_while_training(run: RunContext, tokens: Artifact) -> tuple[Artifact, Artifact, Artifact] | None:
    """Run the stages `reference`, `schedule` and `train` at the same time; return their artifacts.

    Return None if the recipe does not set this mode, or if a group's log-probs cannot be computed. In the second case
    the checkpoints of the training so far are deleted.

    Raises:
        DpoRayError: scoring or training failed. Both have ended before the error is raised.
    """
    if not _is_wanted(run):
        return None
    checkpoints = stages.checkpoints(run, left_out=0)
    try:
        return _score_and_train(run, tokens, oldest_step(checkpoints))
    except UnscorableError as error:
        run.reporter.say(f"[bold yellow]reference[/bold yellow]: {escape(str(error))}")
        run.reporter.say(
            "without these groups the steps change: all groups are scored first, and training starts again"
        )
        checkpoints.delete_tree()
        return None


def _is_wanted(run: RunContext) -> bool:
    """Return whether to run the stages at once: the mode is `streaming`, and `reference` and `train` are not done."""
    reference = run.recipe.reference
    if "reference" not in run.plan.stages or reference.mode != "streaming" or reference.engine != "vllm":
        return False
    return run.find("reference") is None and run.find("train") is None


def _score_and_train(run: RunContext, tokens: Artifact, first_step: int) -> tuple[Artifact, Artifact, Artifact]:
    """Compute log-probs and pack groups in the order of the steps, in a thread; train on the steps that are ready.

    Args:
        first_step: the step from which training may resume; training does not wait for earlier steps.

    Returns:
        The artifacts of the stages `reference`, `schedule` and `train`.

    Raises:
        UnscorableError: a group's log-probs cannot be computed. The steps then change, so the training is of no use.
    """
    orders, staging = order_splits(tokens, run.recipe.train, run.recipe.seed), run.begin("schedule")
    live = LiveSchedule.start(count_rows(orders), staging.storage, start_inbox())

    def score(began: threading.Event, stop: threading.Event) -> tuple[Artifact, Artifact]:
        of_reference, of_schedule = run.provenance("reference"), run.provenance("schedule")
        with run.reporter.stage("reference", "groups", sum(order.groups for order in orders), beside=True) as bar:
            tally, entries = _score(run, tokens, first_step, orders, staging, live, bar, began, stop)
        referenced = reference_stage.join(tokens, run.reference_store, tally, run.begin("reference"), of_reference)
        scheduled = of_schedule.commit(staging, entries, rows=count_rows(orders), figures={})
        live.move(scheduled)
        return referenced, scheduled

    (referenced, scheduled), trained = run_side_by_side(
        score, lambda wait: stages.train(run, live, tokens, before_commit=wait), live.fail
    )
    return referenced, scheduled, trained


def _score(
    run: RunContext,
    tokens: Artifact,
    first_step: int,
    orders: Sequence[SplitOrder],
    staging: Staging,
    live: LiveSchedule,
    bar: Bar,
    began: threading.Event,
    stop: threading.Event,
) -> tuple[ScoringTally, list[FileEntry]]:
    """Compute the log-probs of all groups and write all files of the schedule; return the counts and the files' entries.

    Set `began` when training may start, and announce each file to `live` when it is ready.
    """
    config, train = run.recipe.reference, run.recipe.train
    tally = ScoringTally(sum(order.groups for order in orders))

    def on_lookup(found: int, known_groups: int) -> None:
        tally.add_known(found, known_groups)
        bar.advance(known_groups, tally.describe())

    def announce(entries: Sequence[FileEntry]) -> None:
        live.announce([entry.name for entry in entries])
        began.set()

    with tempfile.TemporaryDirectory(prefix="dpo-ray-schedule-") as scratch:
        sources = [(o.split, [partial(read_table, tokens, n) for n in o.parts], o.steps, o.groups) for o in orders]
        in_order = InOrder(
            deal_turns(sources, first_step, train.eval_every_steps, Path(scratch)),
            run.reference_store,
            config.groups_per_granule,
            config.replicas,
            Packing(train.workers, train.tokens_per_micro_batch),
            staging,
            announce,
            on_lookup,
        )
        pool = EnginePool(run.scorer_settings(), run.reference_store, config, run.plan.hardware.engine, bar.say)
        for scored in in_order.run(pool.run, stop):
            began.set()  # the pool has an engine by now, so training may take the remaining resources
            tally.add(scored)
            bar.advance(scored.groups, f"{tally.describe()}, engines {pool.ready}/{pool.size}")
        return tally, in_order.entries()


def run_side_by_side(
    score: Callable[[threading.Event, threading.Event], S],
    train: Callable[[Callable[[], S]], T],
    fail: Callable[[str], None],
) -> tuple[S, T]:
    """Run `score` in a new thread and `train` in this thread; return the results of both.

    Args:
        score: called with two events. It sets the first event when `train` may start. If the second event is set, it
            must stop by raising `Stopped`.
        train: called with a function that waits for the result of `score` and returns it.
        fail: called with the reason if `score` fails, so that `train` ends.

    Raises:
        The error of `score` or, if `score` has not failed, the error of `train`. Both functions have ended by then.
    """
    began, stop, scoring = threading.Event(), threading.Event(), Future()

    def run() -> None:
        try:
            scoring.set_result(score(began, stop))
        except BaseException as error:
            scoring.set_exception(error)
            if not stop.is_set():
                fail(str(error))
        finally:
            began.set()

    thread = threading.Thread(target=run, name="scoring", daemon=True)
    thread.start()
    try:
        began.wait()
        if scoring.done():
            scoring.result()
        trained = train(scoring.result)
        return scoring.result(), trained
    except BaseException as error:
        stop.set()
        thread.join()
        cause = scoring.exception()
        if cause is None or cause is error or isinstance(cause, Stopped):
            raise
        raise cause from error
