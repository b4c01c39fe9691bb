"""The stage `schedule`: which groups each optimizer step sees, packed for every rank."""

from __future__ import annotations

from functools import partial

import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.tokens import groups_of, read_table
from dpo_ray.errors import ArtifactError

from .build import Packing, build_split
from .pack import step_groups


def run(
    tokens: Artifact,
    reference: Artifact | None,
    train: TrainConfig,
    seed: int,
    staging: Staging,
    provenance: Provenance,
) -> Artifact:
    """Order, deal and pack the groups of training and held-out data, and commit the artifact `schedule`."""
    packing = Packing(train.workers, train.tokens_per_micro_batch)
    entries, counts = [], {}
    for split in ("train", "eval"):
        parts = tokens.names(f"{split}/")
        if not parts:
            continue
        ids = [i for name in parts for i in read_table(tokens, name, ["group_id"])["group_id"].to_pylist()]
        epochs, steps = (train.epochs, train.steps) if split == "train" else (1, None)
        order = list(step_groups(ids, seed, train.groups_per_step, epochs, steps))
        loaders = [partial(_load, tokens, reference, name) for name in parts]
        entries += build_split(split, loaders, _groups, order, packing, staging)
        counts |= {f"{split}/steps": len(order), f"{split}/groups": len(ids)}
    return provenance.commit(staging, entries, rows=counts, figures={})


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
