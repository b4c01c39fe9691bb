"""A world of which every response is known: how much of what can be had does training get?

Four prompts, responses of five tokens of six: all 31,104 are scored, so reward and divergence of a policy are exact. The most
of E[r] - beta KL(policy || reference) that any policy has is beta log Z (Rafailov et al. 2023, 2305.18290, appendix A.1), and
the most reward at a divergence is that of the reference tilted by the reward. Training is the project's own step.
"""

from __future__ import annotations

import statistics
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.frontier.policy import PROMPTS, aligned, exact, make_reference, make_reward, token_table
from benchmarks.frontier.world import World

BETA, PAIRS, EPOCHS = 0.3, 20_000, 10


@cache
def trained(seed: int) -> tuple[World, Tensor]:
    """Draw pairs from the reference, label them by Bradley-Terry, train; the world and the policy's log-probs of it."""
    generator = torch.Generator().manual_seed(100 + seed)
    policy = make_reference(seed, generator)
    known = token_table(policy)
    world = World(exact(known), make_reward(exact(known), generator))
    return world, aligned(policy, known, world.reward, BETA, rounds=1, pairs=PAIRS, epochs=EPOCHS, generator=generator)


def share_of_optimum(seed: int) -> float:
    world, policy = trained(seed)
    return world.objective(policy, BETA) / world.optimum(BETA)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(3))
def test_most_of_the_optimum_is_reached_and_nothing_beyond_the_frontier(seed: int) -> None:
    world, policy = trained(seed)
    for table in (world.reference, policy):
        assert table.exp().sum(-1).tolist() == pytest.approx([1.0] * PROMPTS, abs=1e-12)
    assert world.objective(world.reference, BETA) == pytest.approx(0.0, abs=1e-12)
    assert not world.is_beyond(policy)
    assert 0.70 <= share_of_optimum(seed) <= 1.0


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_median_share_of_the_optimum() -> None:
    assert statistics.median(share_of_optimum(seed) for seed in range(3)) >= 0.80
