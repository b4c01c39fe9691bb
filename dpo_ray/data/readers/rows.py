"""Reads the rows of a piece, which is a range of a shard (input file). A damaged row does not affect the other rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dpo_ray.data import synthetic
from dpo_ray.data.admission import Rejected
from dpo_ray.data.sources import Piece
from dpo_ray.errors import DpoRayError

from .arrow_rows import arrow_rows, hub_rows, parquet_rows
from .chunks import text_chunks
from .csv_rows import csv_rows
from .json_rows import json_rows
from .locations import file_name, opened, shown

Batch = list[tuple[int, Any]]


def read_batches(piece: Piece, max_rows: int, max_bytes: int = 64 << 20) -> Iterator[Batch]:
    """Yield lists of (ordinal, row). The ordinal is the number of the row within the piece, from 0.

    A row is a dict or another JSON value, or `Rejected` if this row cannot be read. If the shard itself cannot be read to
    its end, the last row is a `Rejected` with one of the reasons SHARD_*; the lost rows together count as this one row.

    Args:
        max_rows: the maximum number of rows in a list.
        max_bytes: the maximum number of input bytes of the rows in a list (estimated for columnar files). A list that
            holds a single row may exceed it.

    Raises:
        InfrastructureError: a remote storage failed while the piece was read; the data itself may be sound.
        DataError: a data set of the hub cannot be loaded.
    """
    batch: Batch = []
    held_bytes = 0
    for ordinal, (row, size_bytes) in enumerate(_to_the_break(piece)):
        if batch and (len(batch) == max_rows or held_bytes + size_bytes > max_bytes):
            yield batch
            batch, held_bytes = [], 0
        batch.append((ordinal, row))
        held_bytes += size_bytes
    if batch:
        yield batch


def _to_the_break(piece: Piece) -> Iterator[tuple[Any, int]]:
    try:
        yield from _rows(piece)
    except DpoRayError:
        raise
    except Rejected as rejected:  # the cause is known
        yield rejected, 0
    except Exception as error:  # a damaged file can raise anything; its account records what
        what = f"{type(error).__name__}: {error}".replace(piece.shard.location, shown(piece.shard.location))
        yield Rejected("SHARD_UNREADABLE", what[:300]), 0


def _rows(piece: Piece) -> Iterator[tuple[Any, int]]:
    shard, columns = piece.shard, piece.shard.columns
    name = file_name(shard.location)
    match shard.kind:
        case "json":
            with opened(shard.location) as raw:
                chunks = text_chunks(raw, name, piece.start, piece.stop)
                yield from json_rows(chunks)
        case "csv" | "tsv":
            with opened(shard.location) as raw:
                yield from csv_rows(text_chunks(raw, name), "," if shard.kind == "csv" else "\t", columns)
        case "parquet":
            with opened(shard.location, at_random=True) as raw:
                yield from parquet_rows(raw, columns, piece.start, piece.stop)
        case "arrow":
            with opened(shard.location, at_random=True) as raw:
                yield from arrow_rows(raw, columns)
        case "synthetic":
            what = json.loads(shard.location)
            split = "train" if shard.split == "train" else "eval"
            yield from ((row, 0) for row in synthetic.preference_pairs(what["pairs"], what["seed"], split))
        case "hub":
            yield from hub_rows(json.loads(shard.location), columns)
