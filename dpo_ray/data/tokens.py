"""The tokens artifact: the Parquet schema of admitted and quarantined rows, written and read in parts."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.schedule.micro_batch import Group

if TYPE_CHECKING:  # tokenizers take seconds to import, and who joins or packs needs none
    from .tokenize import TokenGroup

TOKENS = pa.schema(
    [
        ("group_id", pa.binary(16)),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("scores", pa.list_(pa.float32())),
        ("preference_probability", pa.float32()),
        ("weight", pa.float32()),
    ]
)

QUARANTINE = pa.schema(
    [
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("ordinal", pa.int64()),
        ("sample", pa.string()),
    ]
)


def tokens_table(groups: Sequence[TokenGroup], source: str) -> pa.Table:
    """Make the table of one part."""
    columns = {
        "group_id": [g.group_id for g in groups],
        "source": [source] * len(groups),
        "prompt_ids": [g.prompt_ids for g in groups],
        "completion_ids": [g.completion_ids for g in groups],
        "scores": [g.scores for g in groups],
        "preference_probability": [g.preference_probability for g in groups],
        "weight": [g.weight for g in groups],
    }
    return pa.table(columns, schema=TOKENS)


def parquet_bytes(table: pa.Table) -> bytes:
    """Encode a table; the same table gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(artifact: Artifact, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file of an artifact, through its manifest."""
    with artifact.open(name) as stream:
        return pq.ParquetFile(stream).read(columns=list(columns) if columns is not None else None)


def groups_of(table: pa.Table, reference_token_logps: pa.ChunkedArray | None = None) -> Iterator[Group]:
    """Yield the preference groups of a part, with the reference's log-probs where they are given."""
    logps: list[list[list[float]] | None] = [None] * len(table)
    if reference_token_logps is not None:
        logps = reference_token_logps.to_pylist()
    for row, known in zip(table.to_pylist(), logps, strict=True):
        yield Group(
            group_id=row["group_id"],
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            completion_ids=tuple(np.array(c, np.int32) for c in row["completion_ids"]),
            scores=np.array(row["scores"], np.float32),
            preference_probability=row["preference_probability"],
            weight=row["weight"],
            reference_token_logps=None if known is None else tuple(np.array(k, np.float32) for k in known),
        )
