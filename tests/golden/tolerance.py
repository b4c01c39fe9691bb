"""How close to TRL's a curve has to be: within 1e-4, or less strictly at the steps where the curve itself amplifies rounding.

No two kinds of processor round alike, nor do TRL and dpo_ray on the same one. Most curves forget such differences. Some pass
them on, larger at every step: gradients in the thousands, which AdamW turns into steps of one size, or losses that bend
sharply. How much a curve does so is measured where the test runs, with its model and rows: every weight is moved by some
units in the last place, and the same steps are trained again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .curves import Curve

# An error of 1e-4 in a loss moves nothing but loss and gradient norm, as clipping and AdamW take the gradient's size away.
RELATIVE = {"loss": 5e-5, "grad_norm": 5e-5}
RELATIVE_OF_OTHERS = 1e-4
# A reward that is exactly 0 in the curves (step 1, where policy and reference were one forward pass) is here the float32
# rounding of a difference of two sums of hundreds of nats; so is what that leaves in a mean of such rewards, or in a loss
# that passes through 0 (`robust`). Of a loss above 0.1 it is less than 5e-5.
ABSOLUTE = {"rewards/chosen": 1e-5, "rewards/rejected": 1e-5, "rewards/margins": 1e-5, "loss": 5e-6}

# What a movement is measured by. Rewards and losses count as 1 where they are smaller: what moves a reward by 1e-5 moves the
# slope of the loss by about as much, however small the reward.
SMALLEST_SIZE = {"loss": 1.0, "rewards/chosen": 1.0, "rewards/rejected": 1.0, "rewards/margins": 1.0, "grad_norm": 0.0}
# Times the movement: draws are few, and TRL's own rounding comes on top.
MARGIN = 3.0


def movements(still: Curve, draws: Sequence[Curve], curve: Curve) -> list[float]:
    """Compute how far moved weights take each step of a curve, in plain relative tolerances: the most that was seen so far.

    Args:
        still: the steps from weights that were not moved.
        draws: the same steps from moved ones; one that ended early, as it overflowed, has gone infinitely far.
    """
    seen: list[float] = []
    for i, expected in enumerate(curve[: len(still)]):
        names = SMALLEST_SIZE.keys() & expected.keys()
        here = [movement(draw[i], still[i], names) if i < len(draw) else math.inf for draw in draws]
        seen.append(max([*seen[-1:], *here]))
    return seen


def movement(moved: dict[str, float], still: dict[str, float], names: Iterable[str]) -> float:
    """Compute the largest movement of some metrics in a step, in plain relative tolerances."""
    sizes = {name: max(abs(still[name]), SMALLEST_SIZE[name]) for name in names}
    return max([abs(moved[n] - still[n]) / (relative(n) * size) for n, size in sizes.items() if size > 0], default=0.0)


def widenings(moved: Sequence[float]) -> list[float]:
    """Compute by what factor the tolerance of each step is wider than the plain one: 1 where MARGIN times the movement is less."""
    return [max(1.0, MARGIN * far) for far in moved]


def amplifies(moved: Sequence[float]) -> bool:
    """Return whether a curve amplifies rounding: whether the tolerance of any step is wider than the plain one."""
    return widenings(moved)[-1] > 1.0


def relative(name: str) -> float:
    """Return the plain relative tolerance of a metric."""
    return RELATIVE.get(name, RELATIVE_OF_OTHERS)


def allowed(name: str, value: float, factor: float) -> float:
    """Compute how far from TRL's value a metric may be, where the step's tolerance is `factor` times the plain one."""
    return factor * (relative(name) * abs(value) + ABSOLUTE.get(name, 0.0))


def differences(measured: Curve, curve: Curve, wider: Sequence[float]) -> list[str]:
    """Return a line for every metric of every step that is further from TRL's than the step's tolerance.

    A step that overflows in TRL, which has no loss in the curve, may be refused here.
    """
    if len(measured) < len(curve) and "loss" in curve[len(measured)]:
        return [f"training ended after {len(measured)} of {len(curve)} steps"]
    return [
        f"step {i + 1} {name}: {step[name]:.8g}, TRL {value:.8g}, which may differ by {factor:.3g} times the plain tolerance"
        for i, (step, expected, factor) in enumerate(zip(measured, curve, wider, strict=False))
        for name, value in expected.items()
        if not abs(step[name] - value) <= allowed(name, value, factor)
    ]
