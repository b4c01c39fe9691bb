"""Checks that the objective can learn from every group. This module does not import Ray, as `validate` uses it, too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.objective import Objective, kinds_of_groups
from dpo_ray.data.groups import TokenGroup
from dpo_ray.data.schemas import shard_table, splits
from dpo_ray.errors import DataError

NAMED_GROUPS = 3  # limit of the group ids in an error text
LEARNS_FROM = {
    "pairs": ("no pair of a better and a worse completion", "pairs"),
    "completions": ("no completion with a label", "labelled completions"),
    "lists": ("no two completions of different scores", "rankings"),
}


def check_usable(tokens: Artifact, objective: Objective) -> None:
    """Check, before anything expensive runs, that the objective can use every group.

    Raises:
        DataError: the objective cannot learn from some groups.
    """
    for split in splits(tokens):
        group_ids(tokens, split, tokens.names(f"{split}/"), objective)


def check_first_groups(split: str, groups: Sequence[TokenGroup], objective: Objective) -> None:
    """Check that the objective can use groups that are not committed yet.

    Raises:
        DataError: the objective cannot learn from some of the groups.
    """
    table = shard_table(groups, range(len(groups)), None)
    idle = np.flatnonzero(~_usable(table, kinds_of_groups(objective)))
    if len(idle):
        sizes = {len(groups[i].completion_ids) for i in idle}
        raise _unusable(split, [groups[i].group_id for i in idle], len(groups), objective, sizes)


def group_ids(tokens: Artifact, split: str, names: Sequence[str], objective: Objective) -> list[bytes]:
    """Read the ids of a split's groups, and check that the objective can use every group.

    Raises:
        DataError: the objective cannot learn from some groups.
    """
    ids: list[bytes] = []
    unusable: list[bytes] = []
    sizes: set[int] = set()  # the numbers of completions of the groups that the objective cannot use
    for name in names:
        table = read_table(tokens, name, ["group_id", "scores", "chosen"])
        ids += table["group_id"].to_pylist()
        idle = np.flatnonzero(~_usable(table, kinds_of_groups(objective)))
        unusable += table["group_id"].take(pa.array(idle)).to_pylist()
        sizes.update(_judged(table["scores"])[idle].tolist())
    if unusable:
        raise _unusable(split, unusable, len(ids), objective, sizes)
    return ids


def _usable(table: pa.Table, kinds: set[str]) -> np.ndarray:
    """Return bool [groups], True for each group that an objective can use.

    `kinds` are the kinds of data that the objective learns from. A sum of objectives has several kinds, and can use a
    group only if the group is usable for each of these kinds.
    """
    pairs = _lengths(table["chosen"]) > 0
    usable = np.ones(len(table), bool)
    if "pairs" in kinds:
        usable &= pairs
    if (
        "completions" in kinds
    ):  # these need labels: a pair labels its two completions; a single one has its score as label
        usable &= pairs | (_judged(table["scores"]) == 1)
    if "lists" in kinds:
        scores = table["scores"].combine_chunks()
        lowest, highest = (
            np.array([fold(s) for s in scores.to_pylist()], np.float64).reshape(-1) for fold in (np.nanmin, np.nanmax)
        )
        usable &= highest > lowest
    return usable


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return np.diff(lists.combine_chunks().offsets)


def _judged(scores: pa.ChunkedArray) -> np.ndarray:
    """Count the completions of each group: int64 [groups]. Completions of other prompts, with the score NaN, do not count."""
    lists = scores.combine_chunks()
    known = np.cumsum([0, *~np.isnan(lists.values.to_numpy())])
    return np.diff(known[np.asarray(lists.offsets)])


def _unusable(split: str, idle: Sequence[bytes], groups: int, objective: Objective, sizes: set[int]) -> DataError:
    examples = ", ".join(group.hex() for group in idle[:NAMED_GROUPS])
    more = ", ..." if len(idle) > NAMED_GROUPS else ""
    lacking, needed = (
        " or ".join(words) for words in zip(*(LEARNS_FROM[k] for k in sorted(kinds_of_groups(objective))), strict=True)
    )
    fixes = {
        "for ranked lists, set data.pairing.pairs=best_worst, all or adjacent": max(sizes) > 1,
        "for single completions, choose an objective for unpaired data, or remove the sources of these groups": 1
        in sizes,
    }
    return DataError(
        f"{len(idle):,} of {groups:,} groups have {lacking}, but the objective "
        f"`{objective.type}` learns only from {needed}: {examples}{more}",
        where=f"schedule, {split} data",
        fix="; ".join(fix for fix, applies in fixes.items() if applies),
    )
