"""Collects, for the audit, the reference log-probs that are stored and those that the trainer computes, group by group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .micro_batch import MicroBatch


@dataclass(frozen=True)
class ComparedGroup:
    """The log-probs of one preference group: `stored` reference log-probs, and those that the trainer computed (`own`).

    Pair p prefers completion `chosen[p]` to `rejected[p]`.
    """

    group_id: bytes
    stored: tuple[np.ndarray, ...]  # K x float32 [completion tokens]
    own: tuple[np.ndarray, ...]  # K x float32 [completion tokens]
    chosen: np.ndarray  # int [pairs], from 0 to K - 1
    rejected: np.ndarray  # int [pairs]


def compared_groups(micro_batch: MicroBatch, token_logps: np.ndarray) -> list[ComparedGroup]:
    """Split the stored reference log-probs and the trainer's log-probs of a micro-batch by group.

    Fillers (groups of weight 0) are left out.

    Args:
        token_logps: float32 [completion tokens], the trainer's log-probs.
    """
    in_completion = micro_batch.completion_index > 0
    owner = np.stack([micro_batch.group_index, micro_batch.completion_index])[
        :, in_completion
    ]  # [2, completion tokens]
    cuts = np.flatnonzero(np.diff(owner).any(axis=0)) + 1
    group_of = owner[0, np.concatenate([[0], cuts])]  # [completions]
    stored, own = np.split(micro_batch.reference_token_logps, cuts), np.split(token_logps, cuts)
    groups = []
    for index, group_id in enumerate(micro_batch.group_ids):
        if not micro_batch.weight[index]:
            continue
        first, stop = np.searchsorted(group_of, [index, index + 1])
        pairs = group_of[micro_batch.chosen] == index
        groups.append(
            ComparedGroup(
                group_id,
                tuple(stored[first:stop]),
                tuple(own[first:stop]),
                micro_batch.chosen[pairs] - first,
                micro_batch.rejected[pairs] - first,
            )
        )
    return groups
