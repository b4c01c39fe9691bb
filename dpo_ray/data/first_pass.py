"""The first pass: reads the rows of a piece (a range of a shard, that is, of an input file), and tokenizes them.

The groups are written in parts (Parquet files of limited size). A row that does not become a group is quarantined.
"""

from __future__ import annotations

import functools
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import parquet_bytes
from dpo_ray.config.data import DataConfig
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.tokenizing.chat import load_tokenizer, resolved
from dpo_ray.data.tokenizing.template_process import TemplateProcess
from dpo_ray.data.tokenizing.tokenize import tokenize_groups

from .admission import DETAIL_CHARACTERS, Rejected, printable, sample_of
from .filters import Filter, rejected_by
from .groups import TextGroup, TokenGroup
from .near_duplicates import minhashes
from .pairing import paired
from .schemas import QUARANTINE, shard_table
from .sources import Piece, Shard


@dataclass(frozen=True)
class PrepareTask:
    """The settings that a worker needs to prepare shards (input files). Objects of this class can be pickled."""

    tokenizer_dir: str
    template: str
    config: DataConfig
    filters: tuple[Filter, ...] = ()


@dataclass(frozen=True)
class PartAccount:
    """The result of preparing one part: its counts, and the files that were written.

    Every row either became a group, or was quarantined and is counted in `reasons`.
    """

    rows: int
    groups: int
    reasons: dict[str, int]
    entries: tuple[FileEntry, ...]


def prepare_piece(piece: Piece, staging: Staging, task: PrepareTask) -> Iterator[PartAccount]:
    """Tokenize one piece (range) of a shard in parts of limited size. Yield the result of each part after writing it.

    If a piece is prepared again, the files have the same names and the same bytes.
    """
    for part, rows in enumerate(read_batches(piece, task.config.rows_per_part)):
        name = f"{piece.index:05d}-{part:05d}.parquet"
        with _collection_paused():
            groups, ordinals, quarantined = _divided(rows, piece.shard, task)
        entries = []
        if groups:
            signatures = minhashes(groups) if task.config.rules.near_duplicates is not None else None
            table = shard_table(groups, ordinals, signatures)
            entries.append(staging.write(f"groups/{name}", parquet_bytes(table), rows=len(table)))
        if quarantined:
            bad = pa.Table.from_pylist(quarantined, schema=QUARANTINE)
            entries.append(staging.write(f"quarantine/{name}", parquet_bytes(bad), rows=len(bad)))
        reasons = Counter(row["reason"] for row in quarantined)
        yield PartAccount(len(rows), len(groups), dict(reasons), tuple(entries))


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Disable Python's cyclic garbage collector inside the `with` block.

    The objects that the block creates stay in use, so the collector would cost time and free none of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _divided(
    rows: Sequence[tuple[int, Any]], shard: Shard, task: PrepareTask
) -> tuple[list[TokenGroup], list[int], list[dict[str, Any]]]:
    """Tokenize the rows of one part, and separate the admitted rows from the others.

    Returns:
        The groups of the admitted rows, the ordinals (row numbers in the piece) of these rows, and a quarantine row
        for every other row.
    """
    groups, ordinals, quarantined = [], [], []
    for (ordinal, row), result in zip(rows, tokenized([row for _, row in rows], shard, task), strict=True):
        if isinstance(result, TokenGroup):
            groups.append(result)
            ordinals.append(ordinal)
        else:
            sample = result.detail if isinstance(row, Rejected) else row
            quarantined.append(quarantine_row(result, ordinal, sample_of(sample)))
    return groups, ordinals, quarantined


def tokenized(rows: Sequence[Any], shard: Shard, task: PrepareTask) -> list[TokenGroup | Rejected]:
    """Read, render and tokenize rows of a shard. Return one result per row, in order; `Rejected` if the row is not admitted."""
    tokenizer = _tokenizer(task.tokenizer_dir)
    texts = [_text_group(row, shard, task) for row in rows]
    template = _template(task.tokenizer_dir, task.template)
    return tokenize_groups(texts, tokenizer, template, task.config, _template_process())


def quarantine_row(rejected: Rejected, ordinal: int, sample: str) -> dict[str, Any]:
    """Build the quarantine row of a rejected row, without the columns `split` and `source`, which the second pass adds."""
    detail = printable(rejected.detail, DETAIL_CHARACTERS)
    return {"reason": rejected.reason, "detail": detail, "ordinal": ordinal, "sample": sample}


@functools.lru_cache(maxsize=2)
def _tokenizer(tokenizer_dir: str):
    return load_tokenizer(tokenizer_dir)


@functools.lru_cache(maxsize=2)
def _template(tokenizer_dir: str, template: str) -> str:
    return resolved(template, _tokenizer(tokenizer_dir))


# One process for all parts of a worker: it starts with the first template, and ends when the worker ends.
_template_process = functools.cache(TemplateProcess)


def _text_group(row: Any, shard: Shard, task: PrepareTask) -> TextGroup | Rejected:
    if isinstance(row, Rejected):
        return row
    if not isinstance(row, dict):
        return Rejected("NOT_AN_OBJECT", f"the row is {type(row).__name__}, not an object")
    try:
        controls = task.config.rules.control_characters
        group = text_group(row, shard.row_format, shard.columns, shard.criteria, controls)
        group = paired(group, task.config.pairing)
    except Rejected as rejected:
        return rejected
    return (rejected_by(group, task.filters) if task.filters else None) or group


def commit_shard(staging: Staging, parts: Sequence[tuple[int, PartAccount]], provenance: Provenance) -> Artifact:
    """Commit the artifact of a shard (input file).

    `parts` are pairs: the index of a piece (range of the shard), and the result of one part (written file) of this piece.
    The artifact records the number of rows of each piece as `piece_rows`. With these numbers, ordinals (row numbers
    within a piece) can be converted to row numbers of the shard.
    """
    piece_rows = [0] * (max((piece for piece, _ in parts), default=-1) + 1)
    for piece, part in parts:
        piece_rows[piece] += part.rows
    rows = {"rows_in": sum(piece_rows), "admitted": sum(part.groups for _, part in parts)}
    rows["quarantined"] = rows["rows_in"] - rows["admitted"]
    entries = [entry for _, part in parts for entry in part.entries]
    return provenance.commit(staging, entries, rows=rows, figures={"piece_rows": piece_rows})
