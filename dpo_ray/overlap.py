"""Scoring, scheduling and training side by side (`reference.mode: streaming`). The artifacts are those of `ahead`."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from dpo_ray import planning
from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.cluster.workers import start_inbox
from dpo_ray.data.tokens import read_table
from dpo_ray.observe.progress import Bar
from dpo_ray.planning import Plan
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.stage import Account
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.streaming import InOrder, Stopped
from dpo_ray.schedule.build import Packing
from dpo_ray.schedule.feed import LiveSchedule
from dpo_ray.schedule.stage import SplitOrder, count_rows, order_splits
from dpo_ray.schedule.turns import deal_turns

S = TypeVar("S")
T = TypeVar("T")


def is_wanted(plan: Plan) -> bool:
    """Say whether to score and train side by side: where the recipe says so, and both are still to do."""
    reference = plan.recipe.reference
    if "reference" not in plan.stages:
        return False
    still_to_do = all(planning.found(plan, stage) is None for stage in ("reference", "train"))
    return reference.mode == "streaming" and reference.engine == "vllm" and still_to_do


@dataclass(frozen=True)
class Run:
    """The run as this module sees it."""

    plan: Plan
    tokens: Artifact
    store: ReferenceStore
    settings: ScorerSettings
    first_step: int  # that training may go on from: what lies before is not waited for
    begin: Callable[[str], Staging]  # of a stage; sees that the lease is held
    provenance: Callable[[str], Provenance]
    check_lease: Callable[[], None]


def score_and_train(
    run: Run,
    show: Callable[[int], AbstractContextManager[Bar]],
    train: Callable[[LiveSchedule, Callable[[], object]], Artifact],
) -> tuple[Artifact, Artifact, Artifact]:
    """Score and pack in the order of the steps, in a thread, and train on what is there; returns the three artifacts.

    Args:
        show: shows how many of so many groups are scored.
        train: trains on a schedule that is being written, and calls its second argument before it commits.

    Raises:
        UnscorableError: a group cannot be scored; the steps are then others, and nothing that was trained counts.
        DpoRayError: as scoring or training raise it; the other is ended first.
    """
    recipe = run.plan.recipe
    orders, staging = order_splits(run.tokens, recipe.train, recipe.seed), run.begin("schedule")
    live = LiveSchedule.start(count_rows(orders), staging.storage, start_inbox())

    def score(began: threading.Event, stop: threading.Event) -> tuple[Artifact, Artifact]:
        reference, schedule = run.provenance("reference"), run.provenance("schedule")
        with show(sum(order.groups for order in orders)) as bar:
            account, entries = _scored(run, orders, staging, live, bar, began, stop)
        referenced = reference_stage.join(run.tokens, run.store, account, run.begin("reference"), reference)
        run.check_lease()
        scheduled = schedule.commit(staging, entries, rows=count_rows(orders), figures={})
        live.move(scheduled)
        return referenced, scheduled

    (referenced, scheduled), trained = side_by_side(score, partial(train, live), live.fail)
    return referenced, scheduled, trained


def _scored(
    run: Run,
    orders: Sequence[SplitOrder],
    staging: Staging,
    live: LiveSchedule,
    bar: Bar,
    began: threading.Event,
    stop: threading.Event,
) -> tuple[Account, list[FileEntry]]:
    """Score all groups and write all files of the schedule."""
    config, train = run.plan.recipe.reference, run.plan.recipe.train
    account = Account(sum(order.groups for order in orders))

    def looked(found: int, known_groups: int) -> None:
        account.found += found
        account.done += known_groups
        bar.advance(known_groups, account.words())

    def announce(entries: Sequence[FileEntry]) -> None:
        live.announce([entry.name for entry in entries])
        began.set()

    with tempfile.TemporaryDirectory(prefix="dpo-ray-schedule-") as scratch:
        sources = [(o.split, [partial(read_table, run.tokens, n) for n in o.parts], o.steps, o.groups) for o in orders]
        in_order = InOrder(
            deal_turns(sources, run.first_step, train.eval_every_steps, Path(scratch)),
            run.store,
            config.groups_per_granule,
            config.replicas,
            Packing(train.workers, train.tokens_per_micro_batch),
            staging,
            announce,
            looked,
        )
        pool = EnginePool(run.settings, run.store, config, run.plan.hardware.engine_gpus, bar.say)
        for scored in in_order.run(pool.run, stop):
            began.set()  # the pool has an engine by now: training may take what is left
            account.add(scored)
            bar.advance(scored.groups, f"{account.words()}, engines {pool.ready}/{pool.size}")
        return account, in_order.entries()


def side_by_side(
    score: Callable[[threading.Event, threading.Event], S],
    train: Callable[[Callable[[], S]], T],
    fail: Callable[[str], None],
) -> tuple[S, T]:
    """Run `score` in a thread, and `train` in this one from when `score` has set its first event; return both results.

    Args:
        score: is given that event, and one that tells it to stop with `Stopped`.
        train: is given what waits for the result of `score`.
        fail: is told why `score` failed, so that `train` ends.

    Raises:
        What `score` raised, or else what `train` raised; the other has ended by then.
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
