"""The stage `schedule`: which groups each optimizer step sees, packed for every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.config.objective import Objective
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.tokens import groups_of, read_table, splits
from dpo_ray.errors import ArtifactError, DataError
from dpo_ray.objectives.select import needs_pairs

from .build import Packing, build_split
from .pack import step_groups

NAMED_GROUPS = 3  # group ids that an error names


def run(
    tokens: Artifact,
    reference: Artifact | None,
    train: TrainConfig,
    seed: int,
    staging: Staging,
    provenance: Provenance,
) -> Artifact:
    """Order, deal and pack the groups of training and of every held-out set, and commit the artifact `schedule`.

    Raises:
        DataError: groups without pairs, and an objective that needs pairs; or no groups for the steps asked for.
        ArtifactError: the reference's groups are not those of the tokens.
    """
    packing = Packing(train.workers, train.tokens_per_micro_batch)
    parts = {split: tokens.names(f"{split}/") for split in splits(tokens)}
    ids = {split: _group_ids(tokens, split, names, train.objective) for split, names in parts.items()}
    entries, counts = [], {}
    for split, names in parts.items():
        if not names:
            continue
        epochs, steps = (train.epochs, train.steps) if split == "train" else (1, None)
        order = list(step_groups(ids[split], seed, train.groups_per_step, epochs, steps))
        loaders = [partial(_load, tokens, reference, name) for name in names]
        entries += build_split(split, loaders, _groups, order, packing, staging)
        counts |= {f"{split}/steps": len(order), f"{split}/groups": len(ids[split])}
    return provenance.commit(staging, entries, rows=counts, figures={})


def check_usable(tokens: Artifact, objective: Objective) -> None:
    """See, before anything expensive, that the objective can use every group.

    Raises:
        DataError: groups without pairs, and an objective that needs pairs.
    """
    for split in splits(tokens):
        _group_ids(tokens, split, tokens.names(f"{split}/"), objective)


def _group_ids(tokens: Artifact, split: str, names: Sequence[str], objective: Objective) -> list[bytes]:
    """Read the ids of a split's groups, and see that the objective can use every group.

    Raises:
        DataError: groups without pairs, and an objective that needs pairs.
    """
    ids: list[bytes] = []
    without_pairs: list[bytes] = []
    sizes: set[int] = set()  # completions of the groups without pairs
    for name in names:
        table = read_table(tokens, name, ["group_id", "scores", "chosen"])
        ids += table["group_id"].to_pylist()
        if needs_pairs(objective):
            idle = np.flatnonzero(_lengths(table["chosen"]) == 0)
            without_pairs += table["group_id"].take(pa.array(idle)).to_pylist()
            sizes.update(_lengths(table["scores"])[idle].tolist())
    if without_pairs:
        raise _unusable(split, without_pairs, len(ids), objective, sizes)
    return ids


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return np.diff(lists.combine_chunks().offsets)


def _unusable(
    split: str, without_pairs: Sequence[bytes], groups: int, objective: Objective, sizes: set[int]
) -> DataError:
    named = ", ".join(group.hex() for group in without_pairs[:NAMED_GROUPS])
    more = ", ..." if len(without_pairs) > NAMED_GROUPS else ""
    fixes = {
        "of ranked lists, set data.pairing.pairs=best_worst, all or adjacent": max(sizes) > 1,
        "of single completions, choose an objective for unpaired data or leave their sources out": 1 in sizes,
    }
    return DataError(
        f"{len(without_pairs):,} of {groups:,} groups hold no pair of a better and a worse completion, and the objective "
        f"`{objective.type}` learns from pairs alone: {named}{more}",
        where=f"schedule, {split} data",
        fix="; ".join(fix for fix, applies in fixes.items() if applies),
    )


def _load(tokens: Artifact, reference: Artifact | None, name: str) -> pa.Table:
    table = read_table(tokens, name)
    if reference is None:
        return table
    scored = read_table(reference, name)
    if scored["group_id"] != table["group_id"]:
        raise ArtifactError(
            "the groups are not those of the tokens",
            where=f"{reference.storage.uri}/{name}",
            fix="delete this artifact's directory; the stage runs again",
        )
    return table.append_column("token_logps", scored["token_logps"])


def _groups(table: pa.Table):
    if "token_logps" not in table.column_names:
        return groups_of(table)
    return groups_of(table.drop_columns(["token_logps"]), table["token_logps"])
