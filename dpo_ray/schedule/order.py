"""Order and packing: which groups a step contains, and how they are distributed to ranks. Pure and deterministic."""

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
    """Permute groups by a keyed hash of their ids, so that the order does not depend on their order in the files.

    Returns:
        Indices into `group_ids`. Ties (equal ids) are impossible: ids are unique in an artifact.
    """
    key = f"{seed}/{epoch}".encode()
    return sorted(range(len(group_ids)), key=lambda i: hashlib.blake2b(group_ids[i], digest_size=16, key=key).digest())


def count_steps(groups: int, groups_per_step: int, epochs: int, steps: int | None) -> int:
    """Count the optimizer steps: `steps` if it is set, else as many as `epochs` passes need (the last may be short)."""
    return steps if steps is not None else math.ceil(groups * epochs / groups_per_step)


def step_groups(group_ids: Sequence[bytes], seed: int, groups_per_step: int, epochs: int, steps: int | None):
    """Yield the indices of the groups of every optimizer step: consecutive slices of the concatenated epochs.

    The batch of a step is a function of (group ids, seed, step) alone.

    Raises:
        DataError: steps are requested, but there are no groups to fill them.
    """
    total = count_steps(len(group_ids), groups_per_step, epochs, steps) * groups_per_step
    if total and not group_ids:
        raise DataError("there are no groups", where="schedule", fix="check the quarantine of `prepare`")
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
    """Estimate a group's work in token units: linear layers per token, attention per visible token pair."""
    visible = prompt_tokens * (prompt_tokens + 1) / 2
    visible += sum(n * prompt_tokens + n * (n + 1) / 2 for n in completion_tokens)
    return prompt_tokens + sum(completion_tokens) + visible / ATTENTION_SCALE


def deal(
    tokens: Sequence[int], work: Sequence[float], ranks: int, tokens_per_micro_batch: int
) -> list[list[list[int]]]:
    """Distribute a step's groups to ranks as micro-batches of at most `tokens_per_micro_batch` tokens.

    Every rank gets the same number of micro-batches (collectives need it), so some may be empty: the caller fills them.
    Groups are assigned in order of decreasing work, each to the rank with the least work so far; each rank's groups are
    then packed into its micro-batches first-fit.

    Args:
        tokens: packed length of each group; a group that exceeds the budget gets its own micro-batch.
        work: estimated work of each group, in any unit.

    Returns:
        [ranks][micro-batches][indices into `tokens`], each index exactly once, ascending within a micro-batch.
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
