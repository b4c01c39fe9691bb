"""The stage `prepare`: converts shards (input files) to preference groups as token ids. Every row is counted.

Each shard becomes a separate artifact, so that adding a shard later only requires work on that shard. Then the rules
over all rows (duplicates, conflicts, leakage, caps, mixture) decide which groups are admitted. The admitted groups of all
shards form the tokens artifact.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.cloudpickle import dumps, loads  # pyright: ignore[reportPrivateImportUsage,reportAttributeAccessIssue]

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.data import DataConfig
from dpo_ray.config.roles import PrepareRole

from .first_pass import PartAccount, PrepareTask, commit_shard, prepare_piece
from .second_pass import MergedPart, PreparedShard, choose, commit_tokens, merge_part
from .sources import Shard, pieces

SHARD_STAGE = "shard"
PARTS_PER_TASK = 4


def prepare_shards(
    shards: Mapping[str, Shard],
    store: ArtifactStore,
    run: str,
    task: PrepareTask,
    provenance: Callable[[str], Provenance],
    advance: Callable[[int], None],
    role: PrepareRole,
) -> dict[str, Artifact]:
    """Tokenize the shards (input files) whose artifacts are missing, in one streaming execution of Ray Data.

    Return the artifacts of all shards by key. A shard is committed as soon as its last piece is done, so that a restart
    reads only the unfinished shards again.

    Args:
        shards: the shards by the keys of their artifacts.
        provenance: returns the provenance of a shard's artifact, for the key of this artifact.
        advance: called after each part (some rows of a shard) with its number of rows.
        role: the resources that each task requests.
    """
    artifacts = {key: artifact for key in shards if (artifact := store.find(SHARD_STAGE, key)) is not None}
    missing = {key: shard for key, shard in shards.items() if key not in artifacts}
    if not missing:
        return artifacts
    stagings = {key: store.begin(SHARD_STAGE, key, run) for key in missing}
    provenances = {key: provenance(key) for key in missing}
    todo = [(key, piece) for key, shard in missing.items() for piece in pieces(shard)]
    open_pieces = Counter(key for key, _ in todo)
    parts: dict[str, list[tuple[int, PartAccount]]] = {key: [] for key in missing}
    sent = [{"number": i, "piece": dumps((p, stagings[key]))} for i, (key, p) in enumerate(todo)]
    for row in _in_tasks(sent, partial(_prepare_pieces, task=task), role):
        key, piece = todo[row["number"]]
        if row["part"] is not None:
            part = _part_account(json.loads(row["part"]))
            parts[key].append((piece.index, part))
            advance(part.rows)
            continue
        open_pieces[key] -= 1
        if not open_pieces[key]:
            artifacts[key] = commit_shard(stagings[key], parts.pop(key), provenances[key])
    return artifacts


def _in_tasks(
    items: Sequence[dict[str, Any]], work: Callable[[pa.Table], Iterator[dict[str, Any]]], role: PrepareRole
) -> Iterator[dict[str, Any]]:
    """Run one Ray task for each item, and yield the rows that the tasks return, as soon as they arrive."""
    if items:
        blocks = ray.data.from_items(list(items), override_num_blocks=len(items))
        cpus, memory = role.cpus, math.ceil((role.memory_gib or 0) * 2**30)
        done = blocks.map_batches(work, batch_size=1, batch_format="pyarrow", num_cpus=cpus, memory=memory or None)
        yield from done.iter_rows()


def _prepare_pieces(batch: pa.Table, task: PrepareTask) -> Iterator[dict[str, Any]]:
    """Tokenize pieces in a Ray task. Yield a row for each part, and a row without a part when a piece is done."""
    for number, sent in zip(batch["number"].to_pylist(), batch["piece"].to_pylist(), strict=True):
        piece, staging = loads(sent)
        for part in prepare_piece(piece, staging, task):
            record = {**vars(part), "entries": [e.model_dump() for e in part.entries]}
            yield {"number": [number], "part": pa.array([json.dumps(record)], pa.string())}
        yield {"number": [number], "part": pa.array([None], pa.string())}


def _part_account(fields: dict[str, Any]) -> PartAccount:
    return PartAccount(**{**fields, "entries": tuple(FileEntry.model_validate(e) for e in fields["entries"])})


def merge(
    shards: Sequence[PreparedShard],
    data: DataConfig,
    staging: Staging,
    provenance: Provenance,
    role: PrepareRole,
    *,
    with_mismatched: bool = False,
) -> Artifact:
    """Apply the rules over all rows to the groups of all shards, and commit the tokens artifact.

    Args:
        with_mismatched: append a completion of another prompt to each group (`mismatched.py`).

    Raises:
        DataError: no row of a split was admitted.
    """
    choices = choose(shards, data)
    sent = [{"parts": dumps(choices[i : i + PARTS_PER_TASK])} for i in range(0, len(choices), PARTS_PER_TASK)]
    work = partial(_merge_parts, staging=staging, mismatched_tokens=data.max_length_tokens if with_mismatched else None)
    merged = [_merged_part(json.loads(row["merged"])) for row in _in_tasks(sent, work, role)]
    return commit_tokens(shards, merged, staging, provenance)


def _merge_parts(batch: pa.Table, staging: Staging, mismatched_tokens: int | None) -> Iterator[dict[str, Any]]:
    for choice in (choice for sent in batch["parts"].to_pylist() for choice in loads(sent)):
        part = merge_part(choice, staging, mismatched_tokens)
        yield {"merged": [json.dumps({**vars(part), "entries": [e.model_dump() for e in part.entries]})]}


def _merged_part(fields: dict[str, Any]) -> MergedPart:
    return MergedPart(**{**fields, "entries": tuple(FileEntry.model_validate(e) for e in fields["entries"])})
