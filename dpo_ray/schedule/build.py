"""Build the schedule: from tokens and reference log-probs to packed micro-batches in the order of the steps.

Groups come in the order of files and leave in the order of a permutation. To do that without holding the data, they are
first dealt to buckets (runs of consecutive steps) on local disk; then each bucket, which fits in memory, is packed.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.staging import Staging

from .micro_batch import Group, MicroBatch, pack
from .pack import deal, estimate_work
from .records import MICRO_BATCHES, RankStep, bucket_ranges, file_name, filler, step_table

ROW = "row"  # the column that numbers a bucket's rows through all parts of the split

Steps = Sequence[Sequence[int]]
"""For each step, the row numbers of its groups."""


@dataclass(frozen=True)
class Packing:
    """What shapes the micro-batches."""

    ranks: int
    tokens_per_micro_batch: int


@dataclass(frozen=True)
class Bucket:
    """A run of consecutive steps of one split, which share a file per rank. Pickles."""

    split: str
    first_step: int
    steps: Steps

    @property
    def stop_step(self) -> int:
        return self.first_step + len(self.steps)

    @property
    def rows(self) -> np.ndarray:
        """Return the numbers of the rows that its steps hold, ascending, each once: int64 [rows]."""
        return np.unique(np.concatenate([np.asarray(step, np.int64) for step in self.steps]))


def buckets_of(split: str, steps: Steps) -> list[Bucket]:
    """Cut a split's steps to buckets."""
    return [Bucket(split, b.start, steps[b.start : b.stop]) for b in bucket_ranges(len(steps))]


def build_split(
    split: str,
    parts: Sequence[Callable[[], pa.Table]],
    to_groups: Callable[[pa.Table], Iterator[Group]],
    steps: Steps,
    packing: Packing,
    staging: Staging,
) -> list[FileEntry]:
    """Write one split's micro-batches and return its files.

    Args:
        parts: loaders of the parts' tables; rows are numbered through all of them, in this order.
        to_groups: makes groups of a table's rows.
        steps: for each step, the row numbers of its groups.
    """
    buckets, entries = buckets_of(split, steps), []
    with tempfile.TemporaryDirectory(prefix="dpo-ray-schedule-") as scratch:
        for bucket, file in zip(buckets, deal_rows(parts, buckets, Path(scratch)), strict=True):
            entries += write_bucket(bucket, read_rows(file), to_groups, packing, staging)
            file.unlink()
    return entries


def deal_rows(parts: Sequence[Callable[[], pa.Table]], buckets: Sequence[Bucket], scratch: Path) -> list[Path]:
    """Write every bucket's rows to a file of its own below `scratch`, with the column `row`, reading each part once."""
    files = [scratch / f"{i}.arrow" for i in range(len(buckets))]
    wanted = [bucket.rows for bucket in buckets]
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    offset = 0
    for load in parts:
        table = load()
        for i, rows_of_bucket in enumerate(wanted):
            low, high = np.searchsorted(rows_of_bucket, [offset, offset + len(table)])
            rows = rows_of_bucket[low:high]
            taken = table.take(pa.array(rows - offset)).append_column(ROW, pa.array(rows))
            if i not in writers:
                writers[i] = pa.ipc.new_stream(str(files[i]), taken.schema)
            writers[i].write_table(taken)
        offset += len(table)
    for writer in writers.values():
        writer.close()
    return files


def read_rows(file: Path) -> pa.Table:
    """Read what `deal_rows` wrote for one bucket, in the order of `Bucket.rows`."""
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def write_bucket(
    bucket: Bucket,
    table: pa.Table,
    to_groups: Callable[[pa.Table], Iterator[Group]],
    packing: Packing,
    staging: Staging,
) -> list[FileEntry]:
    """Pack a bucket's steps and write a file for every rank; the same bucket gives the same bytes.

    Args:
        table: the bucket's rows, with the column `row`.
    """
    groups = dict(zip(table[ROW].to_pylist(), to_groups(table.drop_columns([ROW])), strict=True))
    packed = [pack_step([groups[i] for i in step], packing) for step in bucket.steps]
    entries = []
    for rank in range(packing.ranks):
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, MICRO_BATCHES, compression="zstd") as writer:
            for i, (weight, tokens, ranks) in enumerate(packed):
                share = RankStep(bucket.first_step + i, weight, tokens, tuple(ranks[rank]))
                writer.write_table(step_table(share), row_group_size=1 << 20)
        name = file_name(bucket.split, rank, bucket.first_step)
        entries.append(staging.write(name, sink.getvalue(), rows=len(packed)))
    return entries


def pack_step(groups: Sequence[Group], packing: Packing) -> tuple[float, int, list[list[MicroBatch]]]:
    """Pack the groups of one global step: its pair weight, its tokens, and every rank's micro-batches (equally many)."""
    tokens = [g.tokens for g in groups]
    work = [estimate_work(len(g.prompt_ids), [len(c) for c in g.completion_ids]) for g in groups]
    dealt = deal(tokens, work, packing.ranks, packing.tokens_per_micro_batch)
    ranks = [[pack([groups[i] for i in batch]) if batch else filler() for batch in batches] for batches in dealt]
    return sum(pair_weight(g) for g in groups), sum(tokens), ranks


def pair_weight(group: Group) -> float:
    """Add up the weight of a group's pairs: each has the group's."""
    return float(group.weight) * len(group.chosen)
