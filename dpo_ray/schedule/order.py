"""Decides which groups (prompts with completions) each step contains, and which rank and micro-batch each group gets.

All functions are pure and deterministic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from dpo_ray.errors import DataError

# Attention's share of a token's work grows with its position. One unit is a token's work in the linear layers; a token
# at position p adds p / ATTENTION_SCALE. The ratio is 12 x hidden size for a standard block; 8,192 is the hidden size
# of a mid-size model.
ATTENTION_SCALE = 8192 * 12


def epoch_order(group_ids: Sequence[bytes], seed: int, epoch: int) -> list[int]:
    """Shuffle the groups for one epoch: sort the groups by a hash of seed, epoch and group id.

    So the result does not depend on the order of the groups in the files.

    Returns:
        Indices into `group_ids`. No two ids may be equal; they are unique in an artifact.
    """
    key = f"{seed}/{epoch}".encode()
    return sorted(range(len(group_ids)), key=lambda i: hashlib.blake2b(group_ids[i], digest_size=16, key=key).digest())


def count_steps(groups: int, groups_per_step: int, epochs: int, steps: int | None) -> int:
    """Return the number of optimizer steps: `steps` if it is set, else the number that `epochs` passes over the data need.

    The last step may have fewer groups than the others.
    """
    return steps if steps is not None else math.ceil(groups * epochs / groups_per_step)


def step_groups(group_ids: Sequence[bytes], seed: int, groups_per_step: int, epochs: int, steps: int | None):
    """Yield, for each optimizer step, the indices of its groups.

    The epochs, each shuffled differently, follow one another, and the steps are consecutive slices of this sequence. So the
    groups of a step depend only on the group ids, the seed and the number of the step.

    Raises:
        DataError: steps are requested, but there are no groups.
    """
    total = count_steps(len(group_ids), groups_per_step, epochs, steps) * groups_per_step
    if total and not group_ids:
        raise DataError("there are no groups", where="schedule", fix="check which rows `prepare` has quarantined")
    if steps is None:
        total = min(total, len(group_ids) * epochs)
    stream = _endless(group_ids, seed)
    for start in range(0, total, groups_per_step):
        yield [next(stream) for _ in range(min(groups_per_step, total - start))]


def _endless(group_ids: Sequence[bytes], seed: int):
    epoch = 0
    while True:
        yield from epoch_order(group_ids, seed, epoch)
        epoch += 1


def estimate_work(prompt_tokens: int, completion_tokens: Sequence[int]) -> float:
    """Estimate the work of a group. The unit is the work of one token in the linear layers.

    The work of attention is proportional to the number of tokens that each token sees, added up over all tokens.
    """
    visible = prompt_tokens * (prompt_tokens + 1) / 2
    visible += sum(n * prompt_tokens + n * (n + 1) / 2 for n in completion_tokens)
    return prompt_tokens + sum(completion_tokens) + visible / ATTENTION_SCALE


def deal(
    tokens: Sequence[int], work: Sequence[float], ranks: int, tokens_per_micro_batch: int
) -> list[list[list[int]]]:
    """Distribute the groups of a step to ranks, as micro-batches of at most `tokens_per_micro_batch` tokens.

    Every rank gets the same number of micro-batches, because collective operations need it. Some of them may be empty; the
    caller replaces these by fillers (micro-batches of weight 0). Groups are assigned in the order of decreasing work. Each
    group goes to the rank that has the least work so far, and there to the first micro-batch with enough space.

    Args:
        tokens: the number of tokens of each group. A group with more tokens than the limit is alone in its micro-batch.
        work: the estimated work of each group, in any unit.

    Returns:
        [ranks][micro-batches][indices into `tokens`]. Each index occurs exactly once, in ascending order within a
        micro-batch.
    """
    longest_first = sorted(range(len(tokens)), key=lambda i: (-work[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for i in longest_first:
        rank = int(np.argmin(load))
        shares[rank].append(i)
        load[rank] += work[i]
    packed = [_first_fit(share, tokens, tokens_per_micro_batch) for share in shares]
    count = max(len(bins) for bins in packed)
    return [[sorted(b) for b in bins] + [[] for _ in range(count - len(bins))] for bins in packed]


def _first_fit(share: Sequence[int], tokens: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in share:
        for b, free in enumerate(room):
            if tokens[i] <= free:
                bins[b].append(i)
                room[b] -= tokens[i]
                break
        else:
            bins.append([i])
            room.append(budget - tokens[i])
    return bins
