"""Groups whose stored log-probs differ from the trainer's own by amounts that are given."""

from __future__ import annotations

import numpy as np

from dpo_ray.schedule.audit_pairs import ComparedGroup

Completions = list[list[float]]


def group(
    number: int, stored: Completions, own: Completions, pairs: tuple[tuple[int, int], ...] = ((0, 1),)
) -> ComparedGroup:
    chosen, rejected = np.array(pairs, np.int32).reshape(-1, 2).T
    return ComparedGroup(number.to_bytes(16, "big"), arrays(stored), arrays(own), chosen, rejected)


def arrays(completions: Completions) -> tuple[np.ndarray, ...]:
    return tuple(np.array(c, np.float32) for c in completions)


SAMPLE = [
    # d = +1/4, -1/2 and 0: the pair's error is -1/4, its lengths differ by 1
    group(1, [[-0.75, -2.5], [-3.0]], [[-1.0, -2.0], [-3.0]]),
    # d = 0 and 1/4, 1/4, 1/4: error -3/4, lengths differ by -2
    group(2, [[-1.0], [-0.75, -0.75, -0.75]], [[-1.0], [-1.0, -1.0, -1.0]]),
    # one completion, no pair: d = -1/8
    group(3, [[-4.125]], [[-4.0]], ()),
    # three completions, the last better than the first, the second in no pair: d = 1/2 | 0 | 0, 1; error 1/2, lengths +1
    group(4, [[-1.5], [-9.0], [-2.0, -2.0]], [[-2.0], [-9.0], [-2.0, -3.0]], ((2, 0),)),
]
