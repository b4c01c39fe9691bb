"""All figures of the simulation: what was replayed and measured, and what follows for many groups and ranks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.checkpoints import (
    LLAMA_7B,
    LLAMA_70B,
    Checkpoint,
    Measured,
    committing,
    metadata_writing,
    planning,
)
from benchmarks.scale.data import Plane
from benchmarks.scale.failures import Training, mtbf_seconds, young_interval
from benchmarks.scale.pieces import PACKED_GROUPS, Dealt, Order, Packed, Pieces, measure, order
from benchmarks.scale.steps import HH, SHAPE_7B, ULTRAFEEDBACK, Balance, Case, cases, replay

GROUPS_PER_RANK = 8  # of the schedules that are projected
PLANNED_RANKS, PLANNED_TENSORS, COMMITTED_BYTES = 128, 200, 1 << 28
DEFAULT_CHECKPOINT_STEPS = 100  # train.checkpoint_every_steps
# Of an H100 (dense bf16: 989e12) 40 % is assumed: the time of a step is the trainer's work over this.
FLOPS_PER_SECOND = 0.4 * 989e12


@dataclass(frozen=True)
class Schedule:
    """What the stage `schedule` would take, for data of one kind; hours are of one core."""

    plane: Plane
    dealt: Dealt
    packed: Packed
    dealing_hours: float
    dealing_bytes: float  # on disk, beyond the rows
    packing_hours: float
    bucket_bytes: float  # memory of the largest bucket
    manifest_bytes: float
    manifest_memory_bytes: float  # in each training worker


@dataclass(frozen=True)
class Survival:
    """A checkpoint plan against failures: with the interval that loses least, and with the default one."""

    checkpoint: Checkpoint
    mtbf_seconds: float
    young_seconds: float
    best: Training
    default: Training


@dataclass(frozen=True)
class Figures:
    """Everything."""

    balance: tuple[tuple[Case, Balance], ...]
    pieces: Pieces
    order: Order  # of all groups, extrapolated
    schedules: tuple[Schedule, ...]
    checkpoints: Measured
    survivals: tuple[Survival, ...]
    child_peak_bytes: float


def figures(
    worlds: Sequence[int],
    groups_per_rank: Sequence[int],
    fixed_groups: int,
    orders: Sequence[int],
    groups: int,
    say: Callable[[str], None],
) -> Figures:
    """Measure and replay everything, and project it to `groups` groups."""
    drawn = {lengths.name: lengths.draw(PACKED_GROUPS, seed=0) for lengths in (HH, ULTRAFEEDBACK)}
    with ThreadPoolExecutor(
        1
    ) as beside:  # the orders take one core, in processes of their own, and the replay the other
        ordered = beside.submit(order, orders, fixed_groups, say)
        balance = _balance(worlds, groups_per_rank, fixed_groups, say)
        measured = _measured()
        say("checkpoints planned, committed and hashed in small")
        pieces = measure(ordered.result(), drawn, say)
    schedules = [
        _schedule(Plane(groups, ranks, GROUPS_PER_RANK * ranks), dealt, packed, pieces)
        for dealt, packed in zip(pieces.dealt, pieces.packed, strict=True)
        for ranks in worlds
    ]
    step_flops = (
        GROUPS_PER_RANK * sum(SHAPE_7B.flops(p, c) for p, *c in drawn[ULTRAFEEDBACK.name].tolist()) / PACKED_GROUPS
    )
    survivals = [
        _survival(Checkpoint(model, ranks, hybrid, measured), step_flops * model.parameters / LLAMA_7B.parameters)
        for model in (LLAMA_7B, LLAMA_70B)
        for hybrid in (False, True)
        for ranks in worlds
        if ranks >= model.layout_shards and (not hybrid or ranks > model.layout_shards)
    ]
    return Figures(
        tuple(balance),
        pieces,
        pieces.orders[-1].scaled(groups),
        tuple(schedules),
        measured,
        tuple(survivals),
        max(order.peak_bytes for order in pieces.orders),
    )


def _balance(
    worlds: Sequence[int], groups_per_rank: Sequence[int], fixed_groups: int, say: Callable[[str], None]
) -> list[tuple[Case, Balance]]:
    replayed = []
    for case in cases(worlds, groups_per_rank, fixed_groups):
        replayed.append((case, replay(case)))
        if case.groups_per_step == max(groups_per_rank) * case.ranks:
            say(f"replayed steps of {case.ranks:,} ranks, {case.lengths.name}")
    return replayed


def _schedule(plane: Plane, dealt: Dealt, packed: Packed, pieces: Pieces) -> Schedule:
    written = plane.dealt_pieces(dealt.row_bytes)
    dealing_seconds = len(written) * plane.groups * dealt.row_seconds + sum(written) * dealt.piece_seconds
    packing_seconds = plane.groups * packed.group_seconds + plane.rank_steps * packed.rank_step_seconds
    bucket_bytes = plane.bucket_groups * (dealt.row_bytes + packed.group_bytes)
    return Schedule(
        plane,
        dealt,
        packed,
        dealing_seconds / 3600,
        written[-1] * dealt.piece_bytes,
        packing_seconds / 3600,
        bucket_bytes + plane.groups_per_step * packed.step_group_bytes + plane.ranks * packed.rank_bytes,
        plane.schedule_files * pieces.manifest_bytes,
        plane.schedule_files * pieces.manifest_memory_bytes,
    )


def _survival(checkpoint: Checkpoint, step_flops: float) -> Survival:
    mtbf = mtbf_seconds(checkpoint.ranks)
    young = young_interval(checkpoint.copy_seconds, mtbf)

    def training(interval_seconds: float) -> Training:
        return Training(
            mtbf, interval_seconds, checkpoint.copy_seconds, checkpoint.commit_seconds, checkpoint.restart_seconds
        )

    default_seconds = DEFAULT_CHECKPOINT_STEPS * step_flops / FLOPS_PER_SECOND
    return Survival(checkpoint, mtbf, young, training(max(young, checkpoint.commit_seconds)), training(default_seconds))


def _measured() -> Measured:
    """Measure parts of a checkpoint's commit, each in one process and in small."""
    items = PLANNED_RANKS * PLANNED_TENSORS
    with tempfile.TemporaryDirectory(prefix="dpo-ray-scale-") as scratch:
        plan_seconds, _ = _timed(planning(PLANNED_RANKS, PLANNED_TENSORS))
        metadata_seconds, metadata_bytes = _timed(metadata_writing(PLANNED_RANKS, PLANNED_TENSORS, Path(scratch)))
        commit_seconds, _ = _timed(committing(COMMITTED_BYTES, Path(scratch) / "committed"))
    digest_rate = COMMITTED_BYTES / commit_seconds
    return Measured(plan_seconds / items, metadata_bytes / items, metadata_seconds / items, digest_rate)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = call()
    return time.process_time() - began, result
