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
from .records import MICRO_BATCHES, RankStep, file_name, filler, step_table

STEPS_PER_BUCKET = 128


@dataclass(frozen=True)
class Packing:
    """What shapes the micro-batches."""

    ranks: int
    tokens_per_micro_batch: int


def build_split(
    split: str,
    parts: Sequence[Callable[[], pa.Table]],
    to_groups: Callable[[pa.Table], Iterator[Group]],
    steps: Sequence[Sequence[int]],
    packing: Packing,
    staging: Staging,
) -> list[FileEntry]:
    """Write one split's micro-batches and return its files.

    Args:
        parts: loaders of the parts' tables; rows are numbered through all of them, in this order.
        to_groups: makes groups of a table's rows.
        steps: for each step, the row numbers of its groups.
    """
    entries: list[FileEntry] = []
    firsts = range(0, len(steps), STEPS_PER_BUCKET)
    with tempfile.TemporaryDirectory(prefix="dpo-ray-schedule-") as scratch:
        buckets = [np.unique(np.concatenate([np.asarray(s) for s in steps[f : f + STEPS_PER_BUCKET]])) for f in firsts]
        files = _deal_to_buckets(parts, buckets, Path(scratch))
        for first, file in zip(firsts, files, strict=True):
            with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
                table = reader.read_all()
            groups = dict(zip(table["row"].to_pylist(), to_groups(table.drop_columns(["row"])), strict=True))
            entries += _write_bucket(
                split,
                first,
                [[groups[i] for i in step] for step in steps[first : first + STEPS_PER_BUCKET]],
                packing,
                staging,
            )
            file.unlink()
    return entries


def _deal_to_buckets(
    parts: Sequence[Callable[[], pa.Table]], buckets: Sequence[np.ndarray], scratch: Path
) -> list[Path]:
    files = [scratch / f"{i}.arrow" for i in range(len(buckets))]
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    offset = 0
    for load in parts:
        table = load()
        for i, wanted in enumerate(buckets):
            low, high = np.searchsorted(wanted, [offset, offset + len(table)])
            rows = wanted[low:high]
            taken = table.take(pa.array(rows - offset)).append_column("row", pa.array(rows))
            if i not in writers:
                writers[i] = pa.ipc.new_stream(str(files[i]), taken.schema)
            writers[i].write_table(taken)
        offset += len(table)
    for writer in writers.values():
        writer.close()
    return files


def _write_bucket(
    split: str, first_step: int, steps: Sequence[Sequence[Group]], packing: Packing, staging: Staging
) -> list[FileEntry]:
    packed = [pack_step(groups, packing) for groups in steps]
    entries = []
    for rank in range(packing.ranks):
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, MICRO_BATCHES, compression="zstd") as writer:
            for i, (weight, tokens, ranks) in enumerate(packed):
                share = RankStep(first_step + i, weight, tokens, tuple(ranks[rank]))
                writer.write_table(step_table(share), row_group_size=1 << 20)
        entries.append(staging.write(file_name(split, rank, first_step), sink.getvalue(), rows=len(steps)))
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
