"""The stage `schedule`: decides which groups each optimizer step uses, and packs them into micro-batches for every rank."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import read_table
from dpo_ray.cluster.cpu_work import cpu_labels
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.schemas import splits
from dpo_ray.errors import ArtifactError

from .buckets import Steps, buckets_of, deal_rows, read_rows
from .build import Packing, build_split, write_bucket
from .files import most_bucket_steps
from .order import step_groups
from .usable import group_ids

MOST_GROUPS_HERE = (
    10_000  # a split of at most so many groups is packed in this process: starting Ray tasks takes as long
)
MOST_PACKED_AT_ONCE = 8  # buckets packed concurrently; each needs up to a few GiB of memory


def run(
    tokens: Artifact,
    reference: Artifact | None,
    train: TrainConfig,
    seed: int,
    staging: Staging,
    provenance: Provenance,
) -> Artifact:
    """Order, distribute and pack the groups of training and of every held-out set, and commit the artifact `schedule`.

    Raises:
        DataError: the objective cannot learn from some groups, or there are no groups for the requested steps.
        ArtifactError: the artifacts `reference` and `tokens` do not contain the same groups.
    """
    packing = Packing(train.workers, train.tokens_per_micro_batch)
    orders, entries = order_splits(tokens, train, seed, reference), []
    for order in orders:
        loaders = [partial(_load, tokens, reference, name) for name in order.parts]
        build = build_split if order.groups <= MOST_GROUPS_HERE else build_in_tasks
        entries += build(order.split, loaders, order.steps, packing, staging)
    return provenance.commit(staging, entries, rows=count_rows(orders), figures={})


def build_in_tasks(
    split: str,
    parts: Sequence[Callable[[], pa.Table]],
    steps: Steps,
    packing: Packing,
    staging: Staging,
) -> list[FileEntry]:
    """Write the same files as `build_split`, but pack several buckets (ranges of steps) concurrently, in Ray tasks."""
    write: Any = ray.remote(write_bucket).options(label_selector=cpu_labels())
    at_once = max(1, min(MOST_PACKED_AT_ONCE, int(ray.cluster_resources().get("CPU", 0))))
    buckets, entries = buckets_of(split, steps), []
    running: deque[ray.ObjectRef] = deque()
    with tempfile.TemporaryDirectory(prefix="dpo-ray-schedule-") as scratch:
        try:
            for bucket, file in zip(buckets, deal_rows(parts, buckets, Path(scratch)), strict=True):
                if len(running) == at_once:
                    entries += ray.get(running[0])
                    running.popleft()
                running.append(write.remote(bucket, read_rows(file), packing, staging))
                file.unlink()
            while running:
                entries += ray.get(running[0])
                running.popleft()
        finally:
            for task in running:  # after an error, nobody needs the files that these tasks write
                ray.cancel(task)
    return entries


@dataclass(frozen=True)
class SplitOrder:
    """The steps of one split, and the files of the tokens artifact that contain their groups."""

    split: str
    parts: Sequence[str]
    groups: int  # number of groups that are ordered
    steps: Steps  # for each step, the row numbers of its groups, counted through all parts


def order_splits(
    tokens: Artifact, train: TrainConfig, seed: int, reference: Artifact | None = None
) -> list[SplitOrder]:
    """Divide the groups of every split that has groups into steps, the training split first.

    Groups are left out if the artifact `reference` has no log-probs for them.

    Raises:
        DataError: the objective cannot learn from some groups, or there are no groups for the requested steps.
    """
    orders = []
    for split in splits(tokens):
        if names := tokens.names(f"{split}/"):
            ids = group_ids(tokens, split, names, train.objective)
            rows = _scored_rows(reference, names) if reference is not None else np.arange(len(ids))
            epochs, steps = (train.epochs, train.steps) if split == "train" else (1, None)
            in_steps = step_groups([ids[i] for i in rows], seed, train.groups_per_step, epochs, steps)
            orders.append(SplitOrder(split, names, len(rows), [rows[step].tolist() for step in in_steps]))
    return orders


def _scored_rows(reference: Artifact, names: Sequence[str]) -> np.ndarray:
    """Return the numbers of the rows whose groups have log-probs: int64 [rows]. Rows are counted through all files `names`."""
    scored = [read_table(reference, name, ["token_logps"])["token_logps"].is_valid().to_numpy() for name in names]
    return np.flatnonzero(np.concatenate(scored))


def count_rows(orders: Sequence[SplitOrder]) -> dict[str, int]:
    """Return, for every split, the number of steps, the number of groups, and the maximum number of steps of a bucket.

    The names are those of `Schedule.rows`.
    """
    counts = {}
    for order in orders:
        counts[f"{order.split}/steps"] = len(order.steps)
        counts[f"{order.split}/groups"] = order.groups
        counts[f"{order.split}/bucket_steps"] = most_bucket_steps(order.steps)
    return counts


def _load(tokens: Artifact, reference: Artifact | None, name: str) -> pa.Table:
    table = read_table(tokens, name)
    if reference is None:
        return table
    scored = read_table(reference, name)
    if scored["group_id"] != table["group_id"]:
        raise ArtifactError(
            "the artifacts `reference` and `tokens` do not contain the same groups",
            where=f"{reference.storage.uri}/{name}",
            fix="delete this artifact's directory and run again; the stage `reference` will then be repeated",
        )
    return table.append_column("token_logps", scored["token_logps"])
