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
from scale_indexes import indexing, selecting
from scale_process import cost_of
from scale_schedule import dealing, manifest_reading, ordering, packing

KEYS, KEYS_PER_SEGMENT, ROWS = 2_000_000, 2048, 1_000_000
DEALT_PARTS, ROWS_PER_DEALT_PART, DEALT_BUCKETS = 4, 512, 1_000
PACKED_GROUPS, PACKED_STEPS, PACKED_RANKS = 2_048, 4, (8, 264)
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
class Packed:
    """What `write_bucket` takes of each group, and of each rank's share of a step, with lengths of one kind."""

    data: str
    group_seconds: float
    rank_step_seconds: float
    group_bytes: float


@dataclass(frozen=True)
class Pieces:
    """All that was measured."""

    orders: tuple[Order, ...]
    dealt_seconds: float  # of a part and a bucket
    dealt_bytes: float  # of a part and a bucket that share a row, on disk, beyond the rows
    packed: tuple[Packed, ...]
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
        first = next(iter(lengths.values()))
        place = Path(scratch) / "dealt"
        place.mkdir()
        dealt = cost_of(dealing, first[: ROWS_PER_DEALT_PART * DEALT_PARTS], DEALT_PARTS, DEALT_BUCKETS, place)
        say(f"{DEALT_PARTS} parts dealt to {DEALT_BUCKETS:,} buckets: {dealt.cpu_seconds:.1f} s")
        packed = []
        for data, drawn in lengths.items():
            packed.append(_packed(data, drawn, Path(scratch)))
            say(f"packing, {data}: {1e6 * packed[-1].group_seconds:.0f} us a group")
    manifest = cost_of(manifest_reading, MANIFEST_FILES)
    index = cost_of(indexing, KEYS, KEYS_PER_SEGMENT)
    chosen = cost_of(selecting, ROWS)
    say(f"index of {KEYS:,} keys: {index.cpu_seconds:.1f} s; rules over {ROWS:,} rows: {chosen.cpu_seconds:.1f} s")
    return Pieces(
        orders,
        dealt.cpu_seconds / (DEALT_PARTS * DEALT_BUCKETS),
        dealt.result,
        tuple(packed),
        manifest.result / MANIFEST_FILES,
        manifest.cpu_seconds / MANIFEST_FILES,
        manifest.peak_bytes / MANIFEST_FILES,
        index.cpu_seconds / KEYS,
        index.peak_bytes / KEYS,
        chosen.cpu_seconds / ROWS,
        chosen.peak_bytes / ROWS,
    )


def _packed(data: str, lengths: np.ndarray, place: Path) -> Packed:
    """Pack the same groups for few ranks and for many: what more takes longer is the ranks' files."""
    few, many = (cost_of(packing, lengths, PACKED_STEPS, ranks, place) for ranks in PACKED_RANKS)
    rank_step_seconds = (many.cpu_seconds - few.cpu_seconds) / (PACKED_STEPS * (PACKED_RANKS[1] - PACKED_RANKS[0]))
    group_seconds = (few.cpu_seconds - rank_step_seconds * PACKED_STEPS * PACKED_RANKS[0]) / len(lengths)
    return Packed(data, group_seconds, rank_step_seconds, few.peak_bytes / len(lengths))
