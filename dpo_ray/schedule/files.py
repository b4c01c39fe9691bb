"""Writes and reads packed micro-batches as Parquet files, one file for each rank and bucket (range of steps).

A row of a file is one micro-batch, and a row group holds the micro-batches of one step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .micro_batch import MicroBatch

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
MICRO_BATCHES = pa.schema(
    [
        ("step", pa.int64()),
        ("step_weight", pa.float64()),
        ("step_tokens", pa.int64()),
        ("input_ids", _INTS),
        ("position_ids", _INTS),
        ("group_index", _INTS),
        ("completion_index", _INTS),
        ("scores", _FLOATS),
        ("chosen", _INTS),
        ("rejected", _INTS),
        ("reference_token_logps", _FLOATS),
        ("preference_probability", _FLOATS),
        ("weight", _FLOATS),
        ("group_ids", pa.list_(pa.binary(16))),
        ("sources", pa.list_(pa.string())),
    ]
)
_ARRAYS = (
    "input_ids",
    "position_ids",
    "group_index",
    "completion_index",
    "scores",
    "chosen",
    "rejected",
    "reference_token_logps",
    "preference_probability",
    "weight",
)


FIRST_BUCKET_STEPS, MOST_BUCKET_STEPS = 4, 128
MOST_BUCKET_GROUPS = 262_144  # a bucket is packed in memory; a step is never divided between buckets


class Schedule(Protocol):
    """The schedule that steps are read from: a committed artifact, or one that is still being written.

    If it is still being written, `open` waits until the file is ready.
    """

    @property
    def rows(self) -> Mapping[str, int]:
        """Return, for every split, the number of steps, the number of groups, and the maximum number of steps of a bucket.

        The names are `SPLIT/steps`, `SPLIT/groups` and `SPLIT/bucket_steps`.
        """
        ...

    def open(self, name: str) -> BinaryIO: ...


@dataclass(frozen=True)
class RankStep:
    """The micro-batches of one rank in one step. `step_weight` (of pairs) and `step_tokens` are sums over all ranks."""

    step: int
    step_weight: float
    step_tokens: int
    micro_batches: tuple[MicroBatch, ...]


def most_bucket_steps(steps: Sequence[Sequence[int]]) -> int:
    """Compute the maximum number of steps of a bucket. The more groups a step has, the smaller is this maximum."""
    largest = max(map(len, steps), default=1)
    return max(1, min(MOST_BUCKET_STEPS, MOST_BUCKET_GROUPS // largest))


def bucket_ranges(steps: int, most: int = MOST_BUCKET_STEPS) -> list[range]:
    """Divide the steps of a split into buckets, that is, ranges of steps that share a file.

    Each bucket is twice as long as the one before it, up to `most` steps. So the first file is ready early, and a long
    schedule has few files.
    """
    buckets: list[range] = []
    start, size = 0, min(FIRST_BUCKET_STEPS, most)
    while start < steps:
        buckets.append(range(start, min(start + size, steps)))
        start, size = start + size, min(2 * size, most)
    return buckets


def file_name(split: str, rank: int, first_step: int) -> str:
    """Build the name of the file with the steps of a rank from `first_step` on."""
    return f"{split}/rank-{rank:05d}/step-{first_step:09d}.parquet"


def parse_file_name(name: str) -> tuple[str, int, int]:
    """Return the split, the rank and the first step from the name of a file."""
    split, rank, step = name.split("/")
    return split, int(rank.removeprefix("rank-")), int(step.removeprefix("step-").removesuffix(".parquet"))


def step_table(share: RankStep) -> pa.Table:
    """Convert the micro-batches of one rank in one step to a table, with one row per micro-batch."""
    whole = {"step": share.step, "step_weight": share.step_weight, "step_tokens": share.step_tokens}
    columns: dict[str, list] = {name: [value] * len(share.micro_batches) for name, value in whole.items()}
    columns |= {name: [getattr(m, name) for m in share.micro_batches] for name in _ARRAYS}
    columns |= {name: [list(getattr(m, name)) for m in share.micro_batches] for name in ("group_ids", "sources")}
    return pa.table(columns, schema=MICRO_BATCHES)


def _micro_batch(table: pa.Table, row: int) -> MicroBatch:
    arrays = {name: table[name][row].values.to_numpy(zero_copy_only=False) for name in _ARRAYS}
    group_ids, sources = (tuple(table[name][row].as_py()) for name in ("group_ids", "sources"))
    return MicroBatch(**arrays, group_ids=group_ids, sources=sources)


def read_steps(schedule: Schedule, split: str, rank: int, start_step: int = 0) -> Iterator[RankStep]:
    """Yield the steps of a rank in order, beginning with `start_step`. No other state is needed to continue reading.

    If the schedule is still being written, each step is yielded as soon as its file is ready. Files with only steps before
    `start_step` are skipped without waiting.
    """
    most = schedule.rows.get(f"{split}/bucket_steps", MOST_BUCKET_STEPS)  # the default if it is not recorded
    for bucket in bucket_ranges(schedule.rows.get(f"{split}/steps", 0), most):
        if bucket.stop <= start_step:
            continue
        with schedule.open(file_name(split, rank, bucket.start)) as stream:
            file = pq.ParquetFile(stream)
            for row_group in range(max(0, start_step - bucket.start), len(bucket)):
                table = file.read_row_group(row_group)
                yield RankStep(
                    table["step"][0].as_py(),
                    table["step_weight"][0].as_py(),
                    table["step_tokens"][0].as_py(),
                    tuple(_micro_batch(table, row) for row in range(len(table))),
                )


def read_share(
    schedule: Schedule, split: str, rank: int, ranks: int, packed_ranks: int, start_step: int = 0
) -> Iterator[RankStep]:
    """Yield the micro-batches of one rank for each step, if fewer ranks read the schedule than it was packed for.

    `ranks` ranks read a schedule for `packed_ranks` ranks. This rank reads the micro-batches of the packed ranks `rank`,
    `rank + ranks`, and so on. Fillers (micro-batches of weight 0) are added, so that all ranks have the same number of
    micro-batches. The loss is divided by the weight of the whole step, so the number of ranks does not change it.
    """
    own_ranks = range(rank, packed_ranks, ranks)
    most = -(-packed_ranks // ranks)  # the largest number of packed ranks that one rank reads
    for parts in zip(*(read_steps(schedule, split, r, start_step) for r in own_ranks), strict=True):
        micro_batches = [m for part in parts for m in part.micro_batches]
        missing = (most - len(parts)) * len(parts[0].micro_batches)  # the number is the same for all packed ranks
        yield replace(parts[0], micro_batches=(*micro_batches, *(filler() for _ in range(missing))))


def prefetched(steps: Iterator[RankStep], depth: int = 2) -> Iterator[RankStep]:
    """Yield the steps, and read up to `depth` of them ahead in a thread, so that training does not wait for storage.

    If reading a step fails, the error is raised when this step would be yielded.
    """
    ready: queue.Queue[RankStep | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: RankStep | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for step in steps:
                if not put(step):
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, name="schedule-prefetch", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def heldout_splits(schedule: Schedule) -> list[str]:
    """List the held-out splits that have steps (`eval`, or `eval_NAME` per named set), in the same order on all ranks."""
    counts = (name.partition("/") for name, count in schedule.rows.items() if count)
    return sorted(split for split, _, what in counts if what == "steps" and split != "train")


def filler() -> MicroBatch:
    """Build a filler: the smallest possible micro-batch, of weight 0.

    A rank without further groups computes fillers, because all ranks must take part in collective operations.
    """
    zero_weight = np.zeros(1, np.int32)
    return MicroBatch(
        input_ids=np.zeros(3, np.int32),
        position_ids=np.array([0, 1, 1], np.int32),
        group_index=np.zeros(3, np.int32),
        completion_index=np.array([0, 1, 2], np.int32),
        scores=np.array([1, 0], np.float32),
        chosen=np.array([0], np.int32),
        rejected=np.array([1], np.int32),
        reference_token_logps=np.zeros(2, np.float32),
        preference_probability=np.ones(1, np.float32),
        weight=zero_weight.astype(np.float32),
        group_ids=(bytes(16),),
        sources=("",),
    )
