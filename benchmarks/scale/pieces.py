"""Pieces of the project's code, measured in processes of their own, and the straight lines through them.

Seconds are of one processor.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.scale.indexes import indexing, selecting
from benchmarks.scale.process import cost_of
from benchmarks.scale.schedule import dealing, manifest_reading, ordering, packing, token_table

KEYS, KEYS_PER_SEGMENT, ROWS = 2_000_000, 2048, 1_000_000
DEALT_BUCKETS, DEALT_TIMES = (4, 256), 20
PACKED_GROUPS, PACKED_STEPS, PACKED_RANKS = 2_048, (4, 32), (8, 264)
MANIFEST_FILES = 20_000


@dataclass(frozen=True)
class Order:
    """What `order_splits` took for so many groups; `is_measured` is False where it was extrapolated."""

    groups: int
    seconds: float
    peak_bytes: float
    is_measured: bool = True

    def scaled(self, groups: int) -> Order:
        """Extrapolate: a sort takes n log n, lists take n."""
        ratio = groups / self.groups
        growth = ratio * math.log(groups) / math.log(self.groups)
        return Order(groups, self.seconds * growth, self.peak_bytes * ratio, is_measured=False)


@dataclass(frozen=True)
class Dealt:
    """What `deal_rows` takes of each row, and of each piece of a file, with lengths of one kind."""

    row_bytes: float
    row_seconds: float
    piece_seconds: float
    piece_bytes: float  # on disk, beyond the rows


@dataclass(frozen=True)
class Packed:
    """What `write_bucket` takes of each group, and of each rank's share of a step, with lengths of one kind."""

    data: str
    group_seconds: float
    rank_step_seconds: float
    group_bytes: float  # of memory, of each group of the bucket, beside its row
    step_group_bytes: float  # the same, of each group of the step that is being packed
    rank_bytes: float  # the same, of each rank


@dataclass(frozen=True)
class Pieces:
    """All that was measured."""

    orders: tuple[Order, ...]
    dealt: tuple[Dealt, ...]
    packed: tuple[Packed, ...]  # of the same kinds of data, in the same order
    manifest_bytes: float  # of a file
    manifest_seconds: float  # of a file, to read it
    manifest_memory_bytes: float  # of a file, in each process that reads it
    index_seconds: float  # of a key
    index_peak_bytes: float  # of a key, while the index is made
    select_seconds: float  # of a row
    select_peak_bytes: float  # of a row, beyond the columns themselves


def order(groups: Sequence[int], groups_per_step: int, say: Callable[[str], None]) -> tuple[Order, ...]:
    """Order so many groups, one number after the other."""
    ordered = []
    with tempfile.TemporaryDirectory(prefix="dpo-ray-scale-") as scratch:
        for count in groups:
            cost = cost_of(ordering, count, groups_per_step, Path(scratch) / f"order-{count}")
            ordered.append(Order(count, cost.cpu_seconds, cost.peak_bytes))
            say(f"order of {count:,} groups: {cost.cpu_seconds:.1f} s, {cost.peak_bytes / 2**30:.2f} GiB")
    return tuple(ordered)


def measure(orders: tuple[Order, ...], lengths: dict[str, np.ndarray], say: Callable[[str], None]) -> Pieces:
    """Measure all pieces but the `orders`, which are given.

    Args:
        lengths: by kind of data int64 [groups, 3], tokens of prompt and two completions.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-ray-scale-") as scratch:
        dealt, packed = [], []
        for data, drawn in lengths.items():
            dealt.append(_dealt(drawn, Path(scratch)))
            say(f"dealing, {data}: {1e6 * dealt[-1].row_seconds:.1f} us a row")
            packed.append(_packed(data, drawn, Path(scratch)))
            say(f"packing, {data}: {1e6 * packed[-1].group_seconds:.0f} us a group")
    manifest = cost_of(manifest_reading, MANIFEST_FILES)
    index = cost_of(indexing, KEYS, KEYS_PER_SEGMENT)
    chosen = cost_of(selecting, ROWS)
    say(f"index of {KEYS:,} keys: {index.cpu_seconds:.1f} s; rules over {ROWS:,} rows: {chosen.cpu_seconds:.1f} s")
    return Pieces(
        orders,
        tuple(dealt),
        tuple(packed),
        manifest.result / MANIFEST_FILES,
        manifest.cpu_seconds / MANIFEST_FILES,
        manifest.peak_bytes / MANIFEST_FILES,
        index.cpu_seconds / KEYS,
        index.peak_bytes / KEYS,
        chosen.cpu_seconds / ROWS,
        chosen.peak_bytes / ROWS,
    )


def _dealt(lengths: np.ndarray, place: Path) -> Dealt:
    """Deal the same rows to few buckets and to many: what more takes longer is the pieces."""
    few, many = (cost_of(dealing, lengths, buckets, DEALT_TIMES, place) for buckets in DEALT_BUCKETS)
    pieces = DEALT_BUCKETS[1] - DEALT_BUCKETS[0]
    piece_seconds = (many.cpu_seconds - few.cpu_seconds) / (DEALT_TIMES * pieces)
    row_seconds = (few.cpu_seconds / DEALT_TIMES - DEALT_BUCKETS[0] * piece_seconds) / len(lengths)
    row_bytes = token_table(lengths).nbytes / len(lengths)
    return Dealt(row_bytes, row_seconds, piece_seconds, (many.result - few.result) / pieces)


def _packed(data: str, lengths: np.ndarray, place: Path) -> Packed:
    """Pack the same groups in few large steps, for few ranks and for many; and in many small steps."""
    few_ranks, many_ranks = PACKED_RANKS
    large, small = PACKED_STEPS
    few, many = (cost_of(packing, lengths, large, ranks, place) for ranks in PACKED_RANKS)
    steps = cost_of(packing, lengths, small, few_ranks, place)
    rank_step_seconds = (many.cpu_seconds - few.cpu_seconds) / (large * (many_ranks - few_ranks))
    group_seconds = (few.cpu_seconds - rank_step_seconds * large * few_ranks) / len(lengths)
    step_groups, few_groups = len(lengths) / large, len(lengths) / small
    step_group_bytes = (few.peak_bytes - steps.peak_bytes) / (step_groups - few_groups)
    group_bytes = (steps.peak_bytes - few_groups * step_group_bytes) / len(lengths)
    rank_bytes = (many.peak_bytes - few.peak_bytes) / (many_ranks - few_ranks)
    return Packed(data, group_seconds, rank_step_seconds, group_bytes, step_group_bytes, rank_bytes)
