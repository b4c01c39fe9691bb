"""The pairwise losses against values computed one pair at a time with Python's own floats."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config.objective import IpoObjective, RDpoObjective, SigmoidObjective
from dpo_ray.objectives.pairs import PairLogps
from dpo_ray.objectives.select import pair_losses

# policy chosen, policy rejected, reference chosen, reference rejected, tokens of chosen, of rejected
ROWS = [
    (-10.0, -12.0, -11.0, -11.5, 4, 6),
    (-30.5, -20.25, -29.0, -25.0, 17, 3),
    (-5.0, -5.0, -5.0, -5.0, 1, 1),
    (-100.0, -300.0, -250.0, -20.0, 50, 90),
]


def pairs_of(rows: list[tuple[float, ...]], probability: float = 1.0) -> PairLogps:
    columns = [torch.tensor(c, dtype=torch.float32) for c in zip(*rows, strict=True)]
    return PairLogps(*columns, torch.full((len(rows),), probability))


def sigmoid(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    return pair_losses(SigmoidObjective(beta=beta, label_smoothing=label_smoothing), pairs)


def ipo(pairs: PairLogps, beta: float) -> torch.Tensor:
    return pair_losses(IpoObjective(beta=beta), pairs)


def swapped(pairs: PairLogps) -> PairLogps:
    return replace(
        pairs,
        policy_chosen=pairs.policy_rejected,
        policy_rejected=pairs.policy_chosen,
        reference_chosen=pairs.reference_rejected,
        reference_rejected=pairs.reference_chosen,
        chosen_tokens=pairs.rejected_tokens,
        rejected_tokens=pairs.chosen_tokens,
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def dpo(row: tuple[float, ...], beta: float, smoothing: float = 0.0, probability: float = 1.0) -> float:
    """Average the two labels' negative log-likelihoods over who annotated, and who mistook the label."""
    x = beta * ((row[0] - row[2]) - (row[1] - row[3]))
    right, wrong = -log_sigmoid(x), -log_sigmoid(-x)
    as_labelled = (1 - smoothing) * right + smoothing * wrong
    as_flipped = (1 - smoothing) * wrong + smoothing * right
    return probability * as_labelled + (1 - probability) * as_flipped


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("smoothing", "probability"), [(0.0, 1.0), (0.1, 1.0), (0.0, 0.7), (0.2, 0.6)])
def test_sigmoid(beta: float, smoothing: float, probability: float) -> None:
    losses = sigmoid(pairs_of(ROWS, probability), beta, smoothing)
    expected = [dpo(row, beta, smoothing, probability) for row in ROWS]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_at_a_hand_value() -> None:
    # margin = 0.1 ((-10 + 11) - (-12 + 11.5)) = 0.15;  -log(1 / (1 + e^-0.15)) = 0.620957...
    assert sigmoid(pairs_of(ROWS[:1]), 0.1).item() == pytest.approx(math.log(1 + math.exp(-0.15)), rel=1e-6)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("probability", [1.0, 0.8])
def test_ipo(beta: float, probability: float) -> None:
    expected = []
    for pc, pr, rc, rr, tokens_c, tokens_r in ROWS:
        per_token = (pc - rc) / tokens_c - (pr - rr) / tokens_r
        expected.append((per_token - (2 * probability - 1) / (2 * beta)) ** 2)
    assert ipo(pairs_of(ROWS, probability), beta).tolist() == pytest.approx(expected, rel=1e-5)


SMOOTHINGS = st.just(0.0) | st.floats(1e-6, 0.49)  # a recipe cannot hold a number that is nearly 0


@given(st.floats(-500, 0), st.floats(-500, 0), st.floats(0.01, 2), SMOOTHINGS, st.floats(0.5, 1))
def test_losses_of_an_untrained_policy(c: float, r: float, beta: float, smoothing: float, probability: float) -> None:
    """At step 0 policy and reference agree: ln 2 whatever beta and the labels, and (1 / (2 beta))^2."""
    pairs = pairs_of([(c, r, c, r, 5, 9)], probability)
    assert sigmoid(pairs, beta, smoothing).item() == pytest.approx(math.log(2), abs=1e-6)
    certain = replace(pairs, preference_probability=torch.ones(1))
    assert ipo(certain, beta).item() == pytest.approx((1 / (2 * beta)) ** 2, rel=1e-5)


def test_swapping_the_labels_negates_margins_and_mirrors_losses() -> None:
    pairs = pairs_of(ROWS)
    margin = pairs.chosen_logratio - pairs.rejected_logratio
    other = swapped(pairs).chosen_logratio - swapped(pairs).rejected_logratio
    assert torch.equal(margin, -other)
    # -log s(x) + log s(-x) = -x, and (m - t)^2 - (-m - t)^2 = -4 m t
    difference = sigmoid(pairs, 0.1) - sigmoid(swapped(pairs), 0.1)
    torch.testing.assert_close(difference, -0.1 * margin)
    per_token = pairs.chosen_logratio / pairs.chosen_tokens - pairs.rejected_logratio / pairs.rejected_tokens
    difference = ipo(pairs, 0.1) - ipo(swapped(pairs), 0.1)
    torch.testing.assert_close(difference, -4 * per_token * 5.0)


def test_probability_one_half_pulls_nowhere() -> None:
    pairs = pairs_of(ROWS, 0.5)
    torch.testing.assert_close(sigmoid(pairs, 0.1), sigmoid(swapped(pairs), 0.1))
    even = pairs_of(ROWS[2:3], 0.5)
    assert ipo(even, 0.1).item() == 0.0


@pytest.mark.parametrize("size", [1e3, 1e6, 1e15])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_margins_stay_finite(size: float, sign: float, smoothing: float) -> None:
    chosen = torch.tensor([sign * size], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    pairs = PairLogps(chosen, zero, zero, zero, one, one, one)
    loss = sigmoid(pairs, 1.0, smoothing)
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert loss.isfinite().all()
    assert gradient.item() == pytest.approx(smoothing if sign > 0 else smoothing - 1, abs=1e-6)
    assert ipo(pairs, 0.1).isfinite().all()


def test_gradient_of_sigmoid_is_the_papers() -> None:
    """Rafailov et al., section 4: the gradient's weight is beta * s(-margin) on log pi(y+) - log pi(y-)."""
    leaves = [torch.tensor([v], requires_grad=True) for v in (-10.0, -12.0)]
    fixed = [torch.tensor([v]) for v in (-11.0, -11.5, 4.0, 6.0, 1.0)]
    sigmoid(PairLogps(*leaves, *fixed), 0.1).sum().backward()
    weight = 0.1 / (1 + math.exp(0.15))
    assert [leaf.grad.item() for leaf in leaves] == pytest.approx([-weight, weight], rel=1e-5)


def test_the_flipped_half_of_a_soft_label_has_the_lengths_of_the_other_side() -> None:
    """R-DPO, with p = 0.3: 0.3 of the loss of the pair as it is, and 0.7 of the loss of the pair the other way round."""
    objective = RDpoObjective(beta=0.1, alpha=0.05)
    expected = []
    for pc, pr, rc, rr, tokens_c, tokens_r in ROWS:
        margin = 0.1 * ((pc - rc) - (pr - rr)) + 0.05 * (tokens_c - tokens_r)
        expected.append(0.3 * math.log1p(math.exp(-margin)) + 0.7 * math.log1p(math.exp(margin)))
    assert pair_losses(objective, pairs_of(ROWS, 0.3)).tolist() == pytest.approx(expected, rel=1e-5)
