"""The join of groups with their log-probs in the reference store, by key and never by position in a file."""

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
    """The file of reference log-probs for one file of the tokens artifact, and the groups that have no log-probs."""

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
    """Write the reference log-probs for one file of the tokens artifact: the same groups in the same order.

    Args:
        name: name of this file in the tokens artifact; the new file gets the same name.
        unscored: the groups that cannot be scored, by group_id. Their log-probs are written as null.

    Raises:
        ArtifactError: a completion has no log-probs, or their number differs from its number of tokens.
    """
    table = read_table(tokens, name, ["group_id", "source", "prompt_ids", "completion_ids"]).combine_chunks()
    ids = table["group_id"].to_pylist()
    left_out = np.array([group_id in unscored for group_id in ids], bool)  # [groups]
    scored = fetch_token_logps(table.filter(pa.array(~left_out)), store, index)
    places = np.cumsum(~left_out) - 1  # [groups]: the row of each group in `scored`
    token_logps = scored.take(pa.array(places, mask=left_out))
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


def fetch_token_logps(table: pa.Table, store: ReferenceStore, index: StoreIndex) -> pa.ListArray:
    """Fetch the log-probs of all completions of a table from the store, by key.

    Returns:
        One list per group. It contains one list per completion: the float32 log-probs of the completion's tokens.

    Raises:
        ArtifactError: a completion has no log-probs, or their number differs from its number of tokens.
    """
    flat = store.fetch(index, store.keys(table))  # [completions of all groups]
    completions = table["completion_ids"].combine_chunks()  # [groups] lists of [completions] lists of tokens
    tokens, logps = np.diff(completions.flatten().offsets), np.diff(flat.offsets)
    if (wrong := np.flatnonzero(tokens != logps)).size:
        raise ArtifactError(
            f"there are {logps[wrong[0]]} log-probs for a completion of {tokens[wrong[0]]} tokens",
            where=store.partition.uri,
            fix="delete this directory of the store and run again; its log-probs will be computed again",
        )
    offsets = completions.offsets.to_numpy() - completions.offsets[0].as_py()
    return pa.ListArray.from_arrays(pa.array(offsets), flat)
