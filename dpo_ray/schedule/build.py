"""Builds the schedule: packs groups and their reference log-probs into micro-batches, in the order of the steps.

Groups are read in the order of the input files, and written in a shuffled order. All data together may not fit in memory.
Therefore groups are first distributed to buckets (ranges of consecutive steps) on local disk. A bucket fits in memory, and is
then packed step by step.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.staging import Staging
from dpo_ray.data.groups import Group, groups_of

from .buckets import ROW, Bucket, Steps, buckets_of, deal_rows, read_rows
from .files import MICRO_BATCHES, RankStep, file_name, filler, step_table
from .micro_batch import MicroBatch, pack
from .order import deal, estimate_work


@dataclass(frozen=True)
class Packing:
    """The parameters that determine how groups are packed into micro-batches."""

    ranks: int
    tokens_per_micro_batch: int


def build_split(
    split: str,
    parts: Sequence[Callable[[], pa.Table]],
    steps: Steps,
    packing: Packing,
    staging: Staging,
) -> list[FileEntry]:
    """Write the micro-batches of one split, and return the files that were written.

    Args:
        parts: functions that load the split's tables of groups, one for each input file. Rows are numbered consecutively
            through all tables, in this order.
        steps: for each step, the row numbers of its groups.
    """
    buckets, entries = buckets_of(split, steps), []
    with tempfile.TemporaryDirectory(prefix="dpo-ray-schedule-") as scratch:
        for bucket, file in zip(buckets, deal_rows(parts, buckets, Path(scratch)), strict=True):
            entries += write_bucket(bucket, read_rows(file), packing, staging)
            file.unlink()
    return entries


def write_bucket(bucket: Bucket, table: pa.Table, packing: Packing, staging: Staging) -> list[FileEntry]:
    """Pack the steps of a bucket, and write one file for every rank. The files of the same bucket always have the same bytes.

    Args:
        table: the groups of the bucket, with their row numbers in the column `row`.
    """
    table = table.combine_chunks()
    place = {row: i for i, row in enumerate(table[ROW].to_pylist())}
    rows = table.drop_columns([ROW])
    sinks = [io.BytesIO() for _ in range(packing.ranks)]
    with ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(s, MICRO_BATCHES, compression="zstd")) for s in sinks]
        for number, step in enumerate(bucket.steps, bucket.first_step):
            # One step at a time: as Python objects, groups take many times their size in the table.
            groups = list(groups_of(rows.take([place[row] for row in step])))
            weight, tokens, ranks = pack_step(groups, packing)
            for writer, micro_batches in zip(writers, ranks, strict=True):
                share = RankStep(number, weight, tokens, tuple(micro_batches))
                writer.write_table(step_table(share), row_group_size=1 << 20)
    names = [file_name(bucket.split, rank, bucket.first_step) for rank in range(packing.ranks)]
    return [staging.write(n, s.getvalue(), rows=len(bucket.steps)) for n, s in zip(names, sinks, strict=True)]


def pack_step(groups: Sequence[Group], packing: Packing) -> tuple[float, int, list[list[MicroBatch]]]:
    """Pack the groups of one global step.

    Returns:
        The sum of the weights of the step's pairs, the number of the step's tokens, and the micro-batches of each rank. All
        ranks have the same number of micro-batches.
    """
    tokens = [g.tokens for g in groups]
    work = [estimate_work(len(g.prompt_ids), [len(c) for c in g.completion_ids]) for g in groups]
    members = deal(tokens, work, packing.ranks, packing.tokens_per_micro_batch)
    ranks = [[pack([groups[i] for i in batch]) if batch else filler() for batch in batches] for batches in members]
    return sum(pair_weight(g) for g in groups), sum(tokens), ranks


def pair_weight(group: Group) -> float:
    """Sum the weights of a group's pairs. Each pair has the weight of the group."""
    return float(group.weight) * len(group.chosen)
