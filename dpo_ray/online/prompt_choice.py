"""The choice of the prompts that a round samples completions for."""

from __future__ import annotations

from collections.abc import Container, Sequence

from dpo_ray.errors import DataError
from dpo_ray.schedule.order import epoch_order


def prompts_of_round(ids: Sequence[bytes], excluded: Container[bytes], seed: int, number: int, count: int) -> list[int]:
    """Choose the prompts of a round: every prompt is used once before any is used again, in a new order in each pass.

    The result depends only on the set of ids, the seed, `count` and the round's number. If a pass ends within a round,
    the round continues with prompts of the next pass that it does not have yet.

    Args:
        ids: content hashes of the prompts; of equal ones the first counts.
        excluded: ids of prompts that evaluation uses.
        number: of the round; the first is 1.
        count: prompts per round, in every round; if there are fewer, a round has them all.

    Returns:
        Indices into `ids`.

    Raises:
        DataError: no prompt is left.
    """
    index = {key: k for k, key in reversed([*enumerate(ids)]) if key not in excluded}
    if not index:
        raise DataError(
            f"there are no prompts to sample: the evaluation uses all {len(ids):,} of them"
            if ids
            else "there are no prompts",
            where="online.prompts",
            fix="provide more prompts, or use fewer in data.eval",
        )
    pool, count, passes = list(index), min(count, len(index)), 0
    rest: list[bytes] = []
    chosen: list[bytes] = []
    for _ in range(number):
        chosen, rest = rest[:count], rest[count:]
        if missing := count - len(chosen):
            order = [pool[k] for k in epoch_order(pool, seed, passes)]
            passes += 1
            old = {*chosen}
            chosen += [key for key in order if key not in old][:missing]
            new = {*chosen} - old
            rest = [key for key in order if key not in new]
    return [index[key] for key in chosen]
