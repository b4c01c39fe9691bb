"""Building the schedule: from tokens and reference log-probs to packed micro-batches in the order of the steps.

Groups are read in the order of the files and written in the order of a permutation. To do this without holding all data
in memory, they are first distributed to buckets (runs of consecutive steps) on local disk; then each bucket, which fits
in memory, is packed step by step.
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
    """Write one split's micro-batches and return its files.

    Args:
        parts: loaders of the parts' tables, which `groups_of` reads; rows are numbered consecutively through all of
            them, in this order.
        steps: for each step, the row numbers of its groups.
    """
    buckets, entries = buckets_of(split, steps), []
    with tempfile.TemporaryDirectory(prefix="dpo-ray-schedule-") as scratch:
        for bucket, file in zip(buckets, deal_rows(parts, buckets, Path(scratch)), strict=True):
            entries += write_bucket(bucket, read_rows(file), packing, staging)
            file.unlink()
    return entries


def write_bucket(bucket: Bucket, table: pa.Table, packing: Packing, staging: Staging) -> list[FileEntry]:
    """Pack a bucket's steps and write one file for every rank; the same bucket gives the same bytes.

    Args:
        table: the bucket's rows, with the column `row`.
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
        The step's pair weight, its tokens, and the micro-batches of each rank, equally many for all ranks.
    """
    tokens = [g.tokens for g in groups]
    work = [estimate_work(len(g.prompt_ids), [len(c) for c in g.completion_ids]) for g in groups]
    members = deal(tokens, work, packing.ranks, packing.tokens_per_micro_batch)
    ranks = [[pack([groups[i] for i in batch]) if batch else filler() for batch in batches] for batches in members]
    return sum(pair_weight(g) for g in groups), sum(tokens), ranks


def pair_weight(group: Group) -> float:
    """Sum the weights of a group's pairs; each pair has the group's weight."""
    return float(group.weight) * len(group.chosen)
