"""The Parquet schemas of the tokens artifact (the output of `prepare`) and of shard artifacts, and the names of splits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact

from .groups import TokenGroup

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
        ("ordinal", pa.int64()),  # the number of the row within its piece of the shard
        ("prompt_hash", pa.binary(16)),  # hash of the prompt before truncation
        ("opposite_id", pa.binary(16)),  # the group_id of the opposite preference; null if there is none
        ("minhash", pa.binary()),  # null if near duplicates are not searched
    ]
)
"""The rows of a shard's artifact: each holds a group, and the values that the rules over all rows compare."""

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
    """Build the table of one part of a shard (input file), with the schema SHARD.

    `ordinals` and `minhashes` have one entry per group.
    """
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
    """Build a column of lists of token ids (int32) without creating a Python object per id."""
    flat = np.concatenate([np.empty(0, np.int32), *arrays])
    return pa.ListArray.from_arrays(_offsets(arrays), pa.array(flat))


def _lists(lists: Sequence[Sequence[float]], dtype: type[np.generic]) -> pa.ListArray:
    flat = np.fromiter(itertools.chain.from_iterable(lists), dtype)
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(flat))


def _offsets(lists: Sequence[Sequence[object] | np.ndarray]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, lists)], dtype=np.int32))


def splits(tokens: Artifact) -> list[str]:
    """List the splits of a tokens artifact: `train`, then the held-out splits (`eval`, or one `eval_NAME` per named set)."""
    names = [name.removesuffix("/admitted") for name in tokens.manifest.rows if name.endswith("/admitted")]
    return sorted(names, key=lambda name: (name != "train", name))


def sources_of(tokens: Artifact, split: str) -> tuple[str, ...]:
    """List the names of a split's sources, sorted."""
    return tuple(sorted({a["source"] for a in tokens.manifest.figures["accounts"] if a["split"] == split}))


def eval_splits(tokens: Artifact) -> list[str]:
    """List the held-out splits of a tokens artifact that contain at least one group."""
    return [s for s in splits(tokens) if s != "train" and tokens.manifest.rows[f"{s}/admitted"]]
