"""The choice of the prompts for which a round samples completions."""

from __future__ import annotations

from collections.abc import Container, Sequence

from dpo_ray.errors import DataError
from dpo_ray.schedule.order import epoch_order


def prompts_of_round(ids: Sequence[bytes], excluded: Container[bytes], seed: int, number: int, count: int) -> list[int]:
    """Choose the prompts of a round. Every prompt is used once before any prompt is used again.

    Each pass through the prompts has a new random order. If a pass ends within a round, the round continues with the
    next pass, but takes no prompt twice. The result depends only on the set of ids, the excluded ids, the seed, `count`
    and the number of the round.

    Args:
        ids: content hashes of the prompts; if some are equal, the first one is used.
        excluded: ids of prompts that are used in evaluation.
        number: number of the round; the first round is 1.
        count: number of prompts per round. If there are fewer prompts, a round uses all of them.

    Returns:
        Indices into `ids`.

    Raises:
        DataError: there are no prompts, or all are excluded.
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
