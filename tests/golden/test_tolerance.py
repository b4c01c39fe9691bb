"""The rule by which a curve's tolerance follows from how much it amplifies rounding, on made steps."""

from __future__ import annotations

from .tolerance import MARGIN, amplifies, differences, movements, widenings

STEP = {
    "loss": 0.7,
    "grad_norm": 6.0,
    "rewards/chosen": 2.0,
    "rewards/rejected": 1e-3,
    "rewards/margins": 1.999,
    "rewards/accuracies": 0.75,
    "logps/chosen": -400.0,
    "logps/rejected": -500.0,
}
CURVE = [STEP] * 4
PLAIN = [1.0] * 4


def off(**relative: float) -> dict[str, float]:
    """Make a step whose metrics are off by these fractions; rewards/x is written rewards_x."""
    return STEP | {name: STEP[name] * (1 + relative.get(name.replace("/", "_"), 0.0)) for name in STEP}


def test_the_tolerance_follows_the_step() -> None:
    """Before a step that amplifies the tolerance is the plain one, from it on it stays as wide as the widest so far."""
    draws = [[STEP, off(grad_norm=1e-6), off(grad_norm=2e-4), STEP], [STEP, STEP, off(grad_norm=-1e-4), STEP]]
    moved = movements(CURVE, draws, CURVE)
    assert amplifies(moved)
    factors = widenings(moved)
    assert factors[:2] == [1.0, 1.0]
    assert factors[2] == factors[3]
    assert abs(factors[2] - MARGIN * 2e-4 / 5e-5) < 1e-6
    assert differences([STEP, off(grad_norm=1e-4), STEP, STEP], CURVE, factors)
    assert not differences([STEP, STEP, STEP, off(grad_norm=1e-4)], CURVE, factors)


def test_a_metric_near_zero_loosens_nothing() -> None:
    """A reward of 0.001 that moves by 1e-5 has moved by a hundredth of itself, and says nothing of the curve."""
    moved = movements(CURVE, [[off(rewards_rejected=1e-2)] * 4], CURVE)
    assert not amplifies(moved)
    assert widenings(moved) == PLAIN


def test_a_draw_that_overflowed_has_gone_infinitely_far() -> None:
    moved = movements(CURVE, [[STEP, STEP]], CURVE)
    assert widenings(moved) == [1.0, 1.0, float("inf"), float("inf")]


def test_what_differs_is_named_with_its_step() -> None:
    lines = differences([STEP, off(loss=1e-4), STEP, off(rewards_accuracies=0.34)], CURVE, PLAIN)
    assert [line.split(":")[0] for line in lines] == ["step 2 loss", "step 4 rewards/accuracies"]
    assert differences([STEP | {"loss": float("nan")}], CURVE[:1], PLAIN)


def test_a_step_that_is_missing_is_a_difference_unless_trl_overflows_in_it() -> None:
    assert differences(CURVE[:3], CURVE, PLAIN)
    overflowing = {name: value for name, value in STEP.items() if name not in ("loss", "grad_norm")}
    assert not differences(CURVE[:1], [STEP, overflowing], PLAIN)
    assert differences([], [STEP, overflowing], PLAIN)
