"""Policies that are tables, where the optimum is known in closed form: the losses must lead there."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dpo_ray.config import objective as o
from dpo_ray.objectives import step_wide
from dpo_ray.objectives.pairs import PairLogps
from dpo_ray.objectives.select import pair_losses


def pairs_of(policy: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor, probability: Tensor) -> PairLogps:
    """Look up pairs of actions in tables of log-probs; each is one token long."""
    one = torch.ones(len(chosen), dtype=policy.dtype)
    return PairLogps(
        policy[chosen], policy[rejected], reference[chosen], reference[rejected], one, one, probability.to(policy.dtype)
    )


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (o.SigmoidObjective(beta=0.3), math.log(2)),
        (o.SigmoidObjective(beta=0.3, label_smoothing=0.2), math.log(2)),
        (o.SigmoidNormObjective(beta=3.0), math.log(2)),
        (o.IpoObjective(beta=0.1), 25.0),
        (o.HingeObjective(), 1.0),
        (o.ApoZeroObjective(), 1.0),
        (o.ApoDownObjective(), 1.0),
        (o.BcoPairObjective(), 2 * math.log(2)),
        (o.NcaPairObjective(), 2 * math.log(2)),
        (o.SppoHardObjective(beta=0.5), 2.0),
        (o.RobustObjective(label_smoothing=0.1), math.log(2)),
    ],
    ids=lambda x: getattr(x, "type", ""),
)
def test_step_0(objective: o.Objective, expected: float) -> None:
    """Where policy and reference are one, the loss is a constant of the objective, whatever they are."""
    table = torch.linspace(-3, -1, 6, dtype=torch.float64)
    at = torch.arange(6)
    losses = pair_losses(objective, pairs_of(table, table, at, at.flip(0), torch.ones(6)))
    assert losses.tolist() == pytest.approx([expected] * 6, abs=1e-9)
    half = step_wide.kto(torch.zeros(4), torch.tensor([1.0, -1, 1, -1]), torch.tensor(0.0), o.KtoObjective())
    assert half.tolist() == [0.5] * 4


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_dpo_of_all_pairs_ends_at_the_tilted_reference(beta: float) -> None:
    """Bradley-Terry labels over 16 actions: pi = pi_ref exp(r / beta) / Z. Rafailov et al. 2023, eq. 4, within TV 1e-4."""
    torch.manual_seed(0)
    actions = 16
    reward = torch.randn(actions, dtype=torch.float64)
    reference = torch.randn(actions, dtype=torch.float64).log_softmax(0)
    at = torch.tensor(list(itertools.combinations(range(actions), 2)))
    probability = (reward[at[:, 0]] - reward[at[:, 1]]).sigmoid()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    objective = o.SigmoidObjective(beta=beta)

    def closure() -> Tensor:
        optimizer.zero_grad()
        pairs = pairs_of(logits.log_softmax(0), reference, at[:, 0], at[:, 1], probability)
        loss = pair_losses(objective, pairs).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = (reference + reward / beta).softmax(0)
    distance = 0.5 * float((logits.detach().softmax(0) - optimum).abs().sum())
    assert 0.5 * float((reference.exp() - optimum).abs().sum()) > 0.1  # it was not there to begin with
    assert distance < 1e-4


def trained(objective: o.Objective, at: list[tuple[int, int]], actions: int, steps: int) -> list[Tensor]:
    """Train a table on deterministic preferences from a uniform reference by Adam (1e-2); its log-probs after each 2,000."""
    reference = torch.zeros(actions, dtype=torch.float64).log_softmax(0)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=1e-2)
    chosen, rejected = torch.tensor(at).T
    certain, kept = torch.ones(len(at)), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        pairs = pairs_of(logits.log_softmax(0), reference, chosen, rejected, certain)
        pair_losses(objective, pairs).mean().backward()
        optimizer.step()
        if step % 2000 == 0:
            kept.append(logits.detach().log_softmax(0))
    return kept


@pytest.mark.parametrize(
    "tau", [pytest.param(0.1, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_ipo_of_a_certain_preference_stops_at_its_margin(tau: float) -> None:
    """Azar et al. 2023, section 5.4: of two actions pi(1) = sigma(1 / (2 tau)); a total order of three has 2 / (3 tau)."""
    two = trained(o.IpoObjective(beta=tau), [(0, 1)], 2, 4000)[-1]
    assert float(two[0] - two[1]) == pytest.approx(1 / (2 * tau), abs=0.01)
    three = trained(o.IpoObjective(beta=tau), [(0, 1), (1, 2), (0, 2)], 3, 4000)[-1]
    assert float(three[0] - three[1]) == pytest.approx(1 / (3 * tau), abs=0.01)
    assert float(three[0] - three[2]) == pytest.approx(2 / (3 * tau), abs=0.01)


@pytest.mark.slow
def test_ipo_keeps_what_never_wins_alive() -> None:
    """Azar et al. 2023, section 5.4, third data set: 1 and 2 beat each other, 1 beats 3, tau 0.5."""
    table = trained(o.IpoObjective(beta=0.5), [(0, 1), (1, 0), (0, 2)], 3, 4000)[-1].exp()
    assert table.tolist() == pytest.approx([0.4223, 0.4223, 0.1554], abs=0.01)


@pytest.mark.slow
def test_dpo_of_a_certain_preference_has_no_end() -> None:
    """The margin grows as long as it is trained: at 18,000 steps over twice that at 2,000, and pi(1) goes to 1."""
    kept = trained(o.SigmoidObjective(beta=0.5), [(0, 1)], 2, 18_000)
    margins = [float(table[0] - table[1]) for table in kept]
    assert margins == sorted(margins)
    assert margins[-1] > 2 * margins[0]
    assert float(kept[-1][0].exp()) > 0.9999


@pytest.mark.slow
def test_conservative_dpo_ends_where_its_labels_are_as_uncertain_as_it() -> None:
    """cDPO: the gradient is zero where the implied preference is 1 - e, so the margin is logit(1 - e) / beta."""
    table = trained(o.SigmoidObjective(beta=0.5, label_smoothing=0.1), [(0, 1)], 2, 4000)[-1]
    assert float(table[0] - table[1]) == pytest.approx(math.log(9) / 0.5, abs=0.02)
