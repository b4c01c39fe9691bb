"""Every objective against its formula, worked out one pair (or completion, or ranking) at a time in Python's own floats.

The formulas are those of the papers and of TRL 1.16: dpo_trainer.py, kto_trainer.py, orpo_trainer.py, cpo_trainer.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from dpo_ray.config import objective as o
from dpo_ray.config.shaping import AlphaDivergence, Divergence, ForwardKl, JsDivergence, ReverseKl
from dpo_ray.objectives import step_wide
from dpo_ray.objectives.pairs import PairLogps
from dpo_ray.objectives.reference_free import log_one_minus_exp
from dpo_ray.objectives.select import pair_losses
from dpo_ray.objectives.shaping import desensitised, divergence_score, policy_weight

# policy chosen, policy rejected, reference chosen, reference rejected, tokens of chosen, of rejected
ROWS = [
    (-10.0, -12.0, -11.0, -11.5, 4, 6),
    (-30.5, -20.25, -29.0, -25.0, 17, 3),
    (-5.0, -5.0, -5.0, -5.0, 1, 1),
    (-90.0, -120.0, -105.0, -70.0, 50, 90),
]
MEAN_CHOSEN_TOKENS = sum(row[4] for row in ROWS) / len(ROWS)


def pairs_of(probability: float = 1.0, divergence: Divergence | None = None) -> PairLogps:
    columns = [torch.tensor(c, dtype=torch.float32) for c in zip(*ROWS, strict=True)]
    p = torch.full((len(ROWS),), probability)
    return PairLogps(*columns, p, MEAN_CHOSEN_TOKENS, divergence or ReverseKl())


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ls(x: float) -> float:
    return math.log(s(x))


def odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


# Each takes log-ratios of chosen and rejected, their lengths, and their log-probs.
FORMULAS: dict[o.Objective, Callable[[float, float, int, int, float, float], float]] = {
    o.SigmoidObjective(beta=0.1): lambda c, r, n, m, pc, pr: -ls(0.1 * (c - r)),
    o.SigmoidNormObjective(beta=5.0): lambda c, r, n, m, pc, pr: -ls(5 * (c / n - r / m)),
    o.HingeObjective(beta=0.1): lambda c, r, n, m, pc, pr: max(0, 1 - 0.1 * (c - r)),
    o.IpoObjective(beta=0.1): lambda c, r, n, m, pc, pr: (c / n - r / m - 5) ** 2,
    o.ExoPairObjective(beta=0.1, label_smoothing=0.01): lambda c, r, n, m, pc, pr: (
        s(0.1 * (c - r)) * (ls(0.1 * (c - r)) - math.log(0.99))
        + s(-0.1 * (c - r)) * (ls(-0.1 * (c - r)) - math.log(0.01))
    ),
    o.NcaPairObjective(beta=0.1): lambda c, r, n, m, pc, pr: -ls(0.1 * c) - 0.5 * ls(-0.1 * c) - 0.5 * ls(-0.1 * r),
    o.RobustObjective(beta=0.1, label_smoothing=0.2): lambda c, r, n, m, pc, pr: (
        (-0.8 * ls(0.1 * (c - r)) + 0.2 * ls(-0.1 * (c - r))) / 0.6
    ),
    o.BcoPairObjective(beta=0.1): lambda c, r, n, m, pc, pr: -ls(0.1 * c) - ls(-0.1 * r),
    o.SppoHardObjective(beta=0.1): lambda c, r, n, m, pc, pr: (c - 5) ** 2 + (r + 5) ** 2,
    o.ApoZeroObjective(beta=0.1): lambda c, r, n, m, pc, pr: 1 - s(0.1 * c) + s(0.1 * r),
    o.ApoDownObjective(beta=0.1): lambda c, r, n, m, pc, pr: s(0.1 * c) + 1 - s(0.1 * (c - r)),
    o.DiscopopObjective(beta=0.1, tau=0.5): lambda c, r, n, m, pc, pr: (
        -(1 - s(0.2 * (c - r))) * ls(0.1 * (c - r)) + s(0.2 * (c - r)) * math.exp(-0.1 * (c - r))
    ),
    o.RpoObjective(beta=0.1, alpha=0.7): lambda c, r, n, m, pc, pr: -ls(0.1 * (c - r)) - 0.7 * pc / n,
    o.DpopObjective(beta=0.1, penalty=5.0): lambda c, r, n, m, pc, pr: -ls(0.1 * (c - r - 5 * max(0, -c))),
    o.RDpoObjective(beta=0.1, alpha=0.05): lambda c, r, n, m, pc, pr: -ls(0.1 * (c - r) + 0.05 * (n - m)),
    o.SftObjective(): lambda c, r, n, m, pc, pr: -pc / MEAN_CHOSEN_TOKENS,
    o.SimpoObjective(beta=2.0, gamma=0.5): lambda c, r, n, m, pc, pr: -ls(2 * (pc / n - pr / m) - 0.5),
    o.CpoObjective(beta=0.1, alpha=0.5, label_smoothing=0.1): lambda c, r, n, m, pc, pr: (
        -0.9 * ls(0.1 * (pc - pr)) - 0.1 * ls(-0.1 * (pc - pr)) - 0.5 * pc / MEAN_CHOSEN_TOKENS
    ),
    o.SlicObjective(delta=3.0, alpha=0.5): lambda c, r, n, m, pc, pr: (
        max(0, 3 - (pc - pr)) - 0.5 * pc / MEAN_CHOSEN_TOKENS
    ),
    o.OrpoObjective(beta=0.1): lambda c, r, n, m, pc, pr: (
        -pc / MEAN_CHOSEN_TOKENS - 0.1 * ls(odds(pc / n) - odds(pr / m))
    ),
}
IDS = [objective.type for objective in FORMULAS]


@pytest.mark.parametrize(("objective", "formula"), FORMULAS.items(), ids=IDS)
def test_formula(objective: o.Objective, formula: Callable[..., float]) -> None:
    expected = [formula(pc - rc, pr - rr, n, m, pc, pr) for pc, pr, rc, rr, n, m in ROWS]
    assert pair_losses(objective, pairs_of()).tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(("objective", "formula"), FORMULAS.items(), ids=IDS)
def test_a_soft_label_is_the_expectation_over_both(objective: o.Objective, formula: Callable[..., float]) -> None:
    expected = []
    for pc, pr, rc, rr, n, m in ROWS:
        right, wrong = formula(pc - rc, pr - rr, n, m, pc, pr), formula(pr - rr, pc - rc, m, n, pr, pc)
        # IPO's is the squared distance from the expected target: the same gradient, another constant.
        constant = 4 * 0.7 * 0.3 * 5**2 if isinstance(objective, o.IpoObjective) else 0.0
        expected.append(0.7 * right + 0.3 * wrong - constant)
    assert pair_losses(objective, pairs_of(0.7)).tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("objective", FORMULAS, ids=IDS)
def test_gradients_are_those_of_finite_differences(objective: o.Objective) -> None:
    """In float64, so that the difference quotient is good to 1e-6."""
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*ROWS[:2], strict=True)]
    leaves = [c.clone().requires_grad_() for c in columns[:2]]
    p = torch.ones(2, dtype=torch.float64)
    pairs = PairLogps(*leaves, *columns[2:], p, MEAN_CHOSEN_TOKENS)
    gradients = torch.autograd.grad(pair_losses(objective, pairs).sum(), leaves, allow_unused=True)
    for i, gradient in enumerate(gradients):
        for at in range(2):
            values = []
            for step in (1e-5, -1e-5):
                moved = [leaf.detach().clone() for leaf in leaves]
                moved[i][at] += step
                values.append(
                    pair_losses(objective, PairLogps(*moved, *columns[2:], p, MEAN_CHOSEN_TOKENS)).sum().item()
                )
            expected = (values[0] - values[1]) / 2e-5
            assert (0.0 if gradient is None else gradient[at].item()) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot_sorts_over_all_pairs(smoothing: float) -> None:
    policy = sorted(pc - pr for pc, pr, *_ in ROWS)
    reference = sorted(rc - rr for _, _, rc, rr, *_ in ROWS)
    margins = [0.1 * (a - b) for a, b in zip(policy, reference, strict=True)]
    expected = [-(1 - smoothing) * ls(x) - smoothing * ls(-x) for x in margins]
    losses = pair_losses(o.AotObjective(beta=0.1, label_smoothing=smoothing), pairs_of())
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_aot_unpaired_sorts_chosen_and_rejected_apart() -> None:
    chosen, rejected = sorted(r[0] - r[2] for r in ROWS), sorted(r[1] - r[3] for r in ROWS)
    expected = [-ls(0.1 * (a - b)) for a, b in zip(chosen, rejected, strict=True)]
    assert pair_losses(o.AotUnpairedObjective(beta=0.1), pairs_of()).tolist() == pytest.approx(expected, rel=1e-5)


def test_kto_by_trls_formula() -> None:
    """losses of chosen 1 - s(beta (r - kl)), of rejected 1 - s(beta (kl - r)), kl = mean of mismatched log-ratios, >= 0."""
    logratio = torch.tensor([2.0, -1.0, 0.5, 3.0, -4.0])
    label = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.5, 1.5])
    mismatched = torch.tensor([False, False, False, True, True])
    objective = o.KtoObjective(beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    assert step_wide.kl_estimate(logratio, weight, mismatched).item() == 0.0  # (1.5 - 6) / 2 < 0
    z0 = step_wide.kl_estimate(-logratio, weight, mismatched)
    assert z0.item() == pytest.approx((-1.5 + 6) / 2)
    expected = [
        1.5 * (1 - s(0.1 * (2 - 2.25))),
        0.5 * (1 - s(0.1 * (2.25 + 1))),
        1.5 * (1 - s(0.1 * (0.5 - 2.25))),
        0,
        0,
    ]
    assert step_wide.kto(logratio, label, z0, objective).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_untrained_kto_loses_half() -> None:
    zero = torch.zeros(2)
    assert step_wide.kto(zero, torch.tensor([1.0, -1.0]), torch.tensor(0.0), o.KtoObjective()).tolist() == [0.5, 0.5]


def test_listwise_is_the_plackett_luce_likelihood() -> None:
    """The probability of drawing the ranking, best first, each with chance exp(reward) among those left."""
    logratio = torch.tensor([0.3, -1.2, 2.0, 0.7, 5.0])
    scores, group = torch.tensor([3.0, 1.0, 4.0, 2.0, float("nan")]), torch.zeros(5, dtype=torch.int64)
    rewards = [0.5 * x for x in logratio.tolist()[:4]]
    order = sorted(range(4), key=lambda i: -scores[i].item())
    likelihood, total = 1.0, 0.0
    for permutation in itertools.permutations(range(4)):
        p = 1.0
        for k, i in enumerate(permutation):
            p *= math.exp(rewards[i]) / sum(math.exp(rewards[j]) for j in permutation[k:])
        total += p
        likelihood = p if list(permutation) == order else likelihood
    assert total == pytest.approx(1.0)
    losses = step_wide.listwise(logratio, scores, group, o.ListwiseObjective(beta=0.5))
    assert losses.sum().item() == pytest.approx(-math.log(likelihood), rel=1e-5)
    assert losses[4].item() == 0.0


def test_listwise_of_two_is_dpo() -> None:
    logratio, group = torch.tensor([1.0, -0.5, 2.0, 0.0]), torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0])
    losses = step_wide.listwise(logratio, scores, group, o.ListwiseObjective(beta=0.1))
    assert losses.tolist() == pytest.approx([-ls(0.15), 0, 0, -ls(-0.2)], rel=1e-5)


def test_listwise_learns_no_order_among_equals() -> None:
    logratio = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    scores, group = torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3, dtype=torch.int64)
    losses = step_wide.listwise(logratio, scores, group, o.ListwiseObjective(beta=1.0))
    assert losses.tolist() == pytest.approx([-ls(1.0), -ls(2.0), 0], rel=1e-5)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (ReverseKl(), 1.5),
        (ForwardKl(), -math.exp(-1.5)),
        (JsDivergence(), ls(1.5)),
        (AlphaDivergence(alpha=0.3), math.exp(-0.7 * 1.5) / -0.7),
    ],
)
def test_scores_of_f_divergences(divergence: o.Divergence, expected: float) -> None:
    assert divergence_score(torch.tensor(1.5), divergence).item() == pytest.approx(expected, rel=1e-6)
    steep = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    score = divergence_score(steep, divergence)
    score.sum().backward()
    assert score.isfinite().all()
    assert steep.grad.isfinite().all()


def test_desensitised_sums_weigh_what_is_longer_than_the_rival() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    lengths, first, second = torch.tensor([3, 2]), torch.tensor([0]), torch.tensor([1])
    assert desensitised(logps, lengths, first, second, 0.5).tolist() == pytest.approx([-1 - 2 - 0.5 * 3])
    assert desensitised(logps, lengths, second, first, 0.5).tolist() == pytest.approx([-9.0])
    assert desensitised(logps, lengths, first, second, 1.0).tolist() == pytest.approx([-6.0])


def test_the_policys_weight_is_the_mean_excess_over_its_collision() -> None:
    logps, collision = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.5, -1.0, -0.25])
    weight = policy_weight(logps, collision, torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    assert weight.tolist() == pytest.approx([math.exp(-0.75), math.exp(-0.25)])


@pytest.mark.parametrize("x", [-1e-6, -0.01, -0.6, -0.7, -5.0, -80.0])
def test_log_one_minus_exp(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    result = log_one_minus_exp(value)
    result.backward()
    assert result.item() == pytest.approx(math.log(-math.expm1(x)), rel=1e-9)
    assert value.grad.item() == pytest.approx(-math.exp(x) / -math.expm1(x), rel=1e-6)
