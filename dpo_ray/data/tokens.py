"""The tokens artifact: the Parquet schema of admitted and quarantined rows, written and read in parts."""

from __future__ import annotations

import io
import itertools
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
        ("chosen", pa.list_(pa.int16())),  # pair p prefers completion chosen[p] to rejected[p]
        ("rejected", pa.list_(pa.int16())),
        ("preference_probability", pa.float32()),
        ("weight", pa.float32()),
    ]
)

SHARD = pa.schema(
    [
        *(field for field in TOKENS if field.name != "source"),
        ("ordinal", pa.int64()),  # of the row in its piece of the shard
        ("prompt_hash", pa.binary(16)),  # of the prompt before truncation
        ("opposite_id", pa.binary(16)),  # the group_id of the opposite preference; null where there is none
        ("minhash", pa.binary()),  # null where near duplicates are not searched
    ]
)
"""What a shard's artifact holds of each admitted row: its group, and what rules over all rows go by."""

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


def shard_table(groups: Sequence[TokenGroup], ordinals: Sequence[int], minhashes: Sequence[bytes] | None) -> pa.Table:
    """Make the table of one part of a shard, of schema SHARD; `ordinals` and `minhashes` are of each group."""
    completions = [ids for g in groups for ids in g.completion_ids]
    columns = {
        "group_id": pa.array([g.group_id for g in groups], pa.binary(16)),
        "prompt_ids": _id_lists([g.prompt_ids for g in groups]),
        "completion_ids": pa.ListArray.from_arrays(
            _offsets([g.completion_ids for g in groups]), _id_lists(completions)
        ),
        "scores": _lists([g.scores for g in groups], np.float32),
        "chosen": _lists([g.chosen for g in groups], np.int16),
        "rejected": _lists([g.rejected for g in groups], np.int16),
        "preference_probability": pa.array([g.preference_probability for g in groups], pa.float32()),
        "weight": pa.array([g.weight for g in groups], pa.float32()),
        "ordinal": pa.array(ordinals, pa.int64()),
        "prompt_hash": pa.array([g.prompt_hash for g in groups], pa.binary(16)),
        "opposite_id": pa.array([g.opposite_id for g in groups], pa.binary(16)),
        "minhash": pa.nulls(len(groups), pa.binary()) if minhashes is None else pa.array(minhashes, pa.binary()),
    }
    return pa.table(columns, schema=SHARD)


def _id_lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Make a column of lists of token ids (int32) without a Python object for each of them."""
    flat = np.concatenate([np.empty(0, np.int32), *arrays])
    return pa.ListArray.from_arrays(_offsets(arrays), pa.array(flat))


def _lists(lists: Sequence[Sequence[float]], dtype: type[np.generic]) -> pa.ListArray:
    flat = np.fromiter(itertools.chain.from_iterable(lists), dtype)
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(flat))


def _offsets(lists: Sequence[Sequence[object] | np.ndarray]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, lists)], dtype=np.int32))


def splits(tokens: Artifact) -> list[str]:
    """List the splits of a tokens artifact: `train`, then the held-out ones (`eval`, or `eval_NAME` of each set)."""
    names = [name.removesuffix("/admitted") for name in tokens.manifest.rows if name.endswith("/admitted")]
    return sorted(names, key=lambda name: (name != "train", name))


def sources_of(tokens: Artifact, split: str) -> tuple[str, ...]:
    """List the names of a split's sources, sorted."""
    return tuple(sorted({a["source"] for a in tokens.manifest.figures["accounts"] if a["split"] == split}))


def eval_splits(tokens: Artifact) -> list[str]:
    """List the held-out splits of a tokens artifact that hold any group."""
    return [s for s in splits(tokens) if s != "train" and tokens.manifest.rows[f"{s}/admitted"]]


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
            chosen=np.array(row["chosen"], np.int32),
            rejected=np.array(row["rejected"], np.int32),
            preference_probability=row["preference_probability"],
            weight=row["weight"],
            source=row["source"],
            reference_token_logps=None if known is None else tuple(np.array(k, np.float32) for k in known),
        )
