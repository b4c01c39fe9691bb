"""The packed micro-batch: several preference groups concatenated to one row of tokens, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ray.data.groups import Group


@dataclass(frozen=True)
class MicroBatch:
    """Groups packed as `[prompt | completion 1 | ... | completion K] [prompt | ...] ...`.

    Token q attends to token k if both belong to the same group, k <= q, and k is in the prompt or in the same completion as
    q. The `position_ids` of a completion begin at the length of its prompt. `completion_index` is 0 in the prompt, and 1 to K
    in the completions. Arrays with a value per token or per completion have the order of the packed row.
    """

    input_ids: np.ndarray  # int32 [tokens]
    position_ids: np.ndarray  # int32 [tokens]
    group_index: np.ndarray  # int32 [tokens]
    completion_index: np.ndarray  # int32 [tokens]
    scores: np.ndarray  # float32 [completions]
    chosen: np.ndarray  # int32 [pairs]: index of the preferred completion among all completions of the row
    rejected: np.ndarray  # int32 [pairs]
    reference_token_logps: np.ndarray  # float32 [completion tokens]
    preference_probability: np.ndarray  # float32 [groups]
    weight: np.ndarray  # float32 [groups]; 0 = filler, added so that all ranks have the same number of micro-batches
    group_ids: tuple[bytes, ...]
    sources: tuple[str, ...]


def pack(groups: Sequence[Group]) -> MicroBatch:
    """Concatenate groups, in the given order, to one packed row.

    A group without reference log-probs gets zeros. This happens with reference-free objectives, and in the forward pass that
    computes the reference log-probs.
    """
    ids, positions, group_index, completion_index, references = [], [], [], [], []
    counts = [len(g.completion_ids) for g in groups]
    firsts = np.cumsum(counts) - counts  # [groups]: index of each group's first completion among those of the row
    for index, group in enumerate(groups):
        prompt_tokens = len(group.prompt_ids)
        segments = [group.prompt_ids, *group.completion_ids]
        for k, segment in enumerate(segments):
            start = 0 if k == 0 else prompt_tokens
            ids.append(segment)
            positions.append(np.arange(start, start + len(segment), dtype=np.int32))
            group_index.append(np.full(len(segment), index, np.int32))
            completion_index.append(np.full(len(segment), k, np.int32))
        logps = group.reference_token_logps
        references += logps if logps is not None else [np.zeros(len(c), np.float32) for c in group.completion_ids]
    return MicroBatch(
        input_ids=np.concatenate(ids).astype(np.int32),
        position_ids=np.concatenate(positions),
        group_index=np.concatenate(group_index),
        completion_index=np.concatenate(completion_index),
        scores=np.concatenate([g.scores for g in groups]).astype(np.float32),
        chosen=np.concatenate([first + g.chosen for first, g in zip(firsts, groups, strict=True)]).astype(np.int32),
        rejected=np.concatenate([first + g.rejected for first, g in zip(firsts, groups, strict=True)]).astype(np.int32),
        reference_token_logps=np.concatenate(references).astype(np.float32),
        preference_probability=np.array([g.preference_probability for g in groups], np.float32),
        weight=np.array([g.weight for g in groups], np.float32),
        group_ids=tuple(g.group_id for g in groups),
        sources=tuple(g.source for g in groups),
    )
