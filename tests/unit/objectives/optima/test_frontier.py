"""The arithmetic that the frontier of reward and divergence is drawn with, against plain sums over a handful of responses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.frontier.policy import aligned, exact, make_reward, policy_of, token_table
from benchmarks.frontier.world import World

PROBABILITY = [[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.05, 0.2, 0.3, 0.4]]
REWARD = [[0.0, 2.0, -1.0, 2.0, 3.0], [1.0, 1.0, 1.0, -2.0, 0.5]]  # with equals, also at the top
SMALL = World(torch.tensor(PROBABILITY, dtype=torch.float64).log(), torch.tensor(REWARD, dtype=torch.float64))


def made_world(prompts: int = 3, responses: int = 2_000) -> World:
    generator = torch.Generator().manual_seed(0)
    reference, reward = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return World((2 * reference).log_softmax(-1), reward)


def best_of_by_all_draws(n: int, probability: list[float], reward: list[float]) -> list[float]:
    """Go through all ways to draw n; of equally good draws each is as likely the one kept."""
    kept = [0.0] * len(reward)
    for draws in itertools.product(range(len(reward)), repeat=n):
        top = [i for i in draws if reward[i] == max(reward[j] for j in draws)]
        for i in top:
            kept[i] += math.prod(probability[j] for j in draws) / len(top)
    return kept


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_that_of_all_draws(n: int) -> None:
    for row, probability, reward in zip(SMALL.best_of(n).exp().tolist(), PROBABILITY, REWARD, strict=True):
        assert row == pytest.approx(best_of_by_all_draws(n, probability, reward), abs=1e-12)


def test_best_of_n_is_that_of_a_simulation() -> None:
    world, draws = made_world(prompts=1), 200_000
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(world.reference[0].exp(), draws * 4, replacement=True, generator=generator).view(-1, 4)
    best = world.reward[0, drawn].max(-1).values
    assert world.reward_of(world.best_of(4)) == pytest.approx(
        float(best.mean()), abs=4 * float(best.std()) / draws**0.5
    )


@pytest.mark.parametrize("n", [2, 16, 1_024, 1_000_000])
def test_best_of_n_diverges_by_no_more_than_is_known(n: int) -> None:
    """KL <= log n - (n - 1) / n, which responses of tiny probability come close to (Beirami et al. 2024, 2401.01879)."""
    world = made_world()
    kl, bound = world.divergence(world.best_of(n)), math.log(n) - (n - 1) / n
    assert (0.95 * bound if n == 2 else 0) < kl <= bound + 1e-12


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 5.0])
def test_the_optimum_is_beta_log_z_and_no_other_policy_has_more(beta: float) -> None:
    log_z = [
        math.log(sum(p * math.exp(r / beta) for p, r in zip(*row, strict=True)))
        for row in zip(PROBABILITY, REWARD, strict=True)
    ]
    optimum = beta * sum(log_z) / len(log_z)
    assert SMALL.optimum(beta) == pytest.approx(optimum, abs=1e-12)
    assert SMALL.objective(SMALL.tilted(beta), beta) == pytest.approx(optimum, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 3.0):
        other = SMALL.tilted(beta) + scale * torch.randn(2, 5, generator=generator, dtype=torch.float64)
        assert SMALL.objective(other.log_softmax(-1), beta) < optimum


def test_the_frontier_rises_ever_less_to_the_best_reward() -> None:
    world = made_world()
    kls = torch.linspace(0, 12, 61).tolist()
    rewards = [world.frontier(kl) for kl in kls]
    steps = [b - a for a, b in itertools.pairwise(rewards)]
    assert rewards[0] == pytest.approx(world.reward_of(world.reference), abs=1e-3)
    assert rewards[-1] == pytest.approx(float(world.reward.max(-1).values.mean()), abs=2e-3)
    assert min(steps) > 0
    assert all(later < earlier + 1e-9 for earlier, later in itertools.pairwise(steps))


@pytest.mark.parametrize("b", [0.1, 0.3, 1.0, 5.0])
def test_the_frontier_is_reached_and_what_is_beyond_is_seen(b: float) -> None:
    """A table that sums to a millionth more or less than 1 has b (log Z - 1) millionths more of E[r] - b KL, or less."""
    world = made_world()
    policy = world.tilted(b)
    assert world.frontier(world.divergence(policy)) == pytest.approx(world.reward_of(policy), abs=1e-9)
    assert not world.is_beyond(policy)
    wrong = [world.is_beyond(policy + mass) for mass in (-1e-6, 1e-6)]
    assert wrong == ([False, True] if world.optimum(b) > b else [True, False])


@pytest.mark.slow
def test_a_short_training_gains_reward_below_the_frontier() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = policy_of(seed=0)
    known = token_table(policy)
    world = World(exact(known), make_reward(exact(known), generator))
    table = aligned(policy, known, world.reward, 0.5, rounds=2, pairs=1_000, epochs=6, generator=generator)
    assert not world.is_beyond(table)
    kl = world.divergence(table)
    assert world.reward_of(table) > 0.5 * world.frontier(kl) > 0.1
    assert 0 < world.objective(table, 0.5) < world.optimum(0.5)
