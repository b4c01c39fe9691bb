"""The join of the reference store to the groups: by key, never by position; one log-prob for each completion token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.data.schemas import QUARANTINE
from dpo_ray.errors import ArtifactError
from dpo_ray.reference.store.index import StoreIndex
from dpo_ray.reference.store.store import ReferenceStore

from .granule import Unscored

REFERENCE = pa.schema(
    [
        ("group_id", pa.binary(16)),
        ("token_logps", pa.list_(pa.list_(pa.float32()))),  # null: the group cannot be scored
    ]
)


@dataclass(frozen=True)
class JoinedPart:
    """The reference part that corresponds to one tokens part, and its groups without log-probs."""

    entry: FileEntry
    quarantine: pa.Table  # of schema QUARANTINE


def join_part(
    name: str,
    tokens: Artifact,
    store: ReferenceStore,
    index: StoreIndex,
    unscored: Mapping[bytes, Unscored],
    staging: Staging,
) -> JoinedPart:
    """Write the reference part that corresponds to a tokens part: the same groups in the same order.

    Args:
        unscored: groups that cannot be scored, by group_id; their log-probs become null.

    Raises:
        ArtifactError: a completion has no log-probs, or their number differs from its number of tokens.
    """
    table = read_table(tokens, name, ["group_id", "source", "prompt_ids", "completion_ids"]).combine_chunks()
    ids = table["group_id"].to_pylist()
    left_out = np.array([group_id in unscored for group_id in ids], bool)  # [groups]
    scored = table.filter(pa.array(~left_out)).combine_chunks()
    values = store.fetch(index, store.keys(scored))  # [completions of scored groups]
    _check_lengths(scored, values, store)
    offsets = np.zeros(len(table) + 1, np.int32)  # [groups + 1]: of each group's completions
    offsets[1:][~left_out] = _counts(scored["completion_ids"])
    offsets = np.cumsum(offsets, dtype=np.int32)
    token_logps = pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(left_out))
    joined = pa.table({"group_id": table["group_id"], "token_logps": token_logps}, schema=REFERENCE)
    rows = [
        {
            "reason": unscored[group_id].reason,
            "detail": f"group {group_id.hex()}: {unscored[group_id].detail}",
            "split": name.partition("/")[0],
            "source": source,
            "ordinal": None,  # the tokens do not record the row's position in its shard
            "sample": "",
        }
        for group_id, source in zip(ids, table["source"].to_pylist(), strict=True)
        if group_id in unscored
    ]
    entry = staging.write(name, parquet_bytes(joined), rows=len(joined))
    return JoinedPart(entry, pa.Table.from_pylist(rows, schema=QUARANTINE))


def _check_lengths(table: pa.Table, values: pa.ListArray, store: ReferenceStore) -> None:
    """Check that each completion has one log-prob for each of its tokens."""
    inner = [chunk.flatten() for chunk in table["completion_ids"].chunks]
    tokens = np.concatenate([np.empty(0, np.int32), *(np.diff(lists.offsets) for lists in inner)])
    logps = np.diff(values.offsets)
    if (wrong := np.flatnonzero(tokens != logps)).size:
        raise ArtifactError(
            f"there are {logps[wrong[0]]} log-probs for a completion of {tokens[wrong[0]]} tokens",
            where=store.partition.uri,
            fix="delete this directory of the store and run again; its log-probs will be computed again",
        )


def _counts(lists: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *(np.diff(chunk.offsets) for chunk in lists.chunks)])
