"""A world of which every response is known: how much of what can be had does training get?

Four prompts, responses of five tokens of six: all 31,104 are scored, so reward and divergence of a policy are exact. The most
of E[r] - beta KL(policy || reference) that any policy has is beta log Z (Rafailov et al. 2023, 2305.18290, appendix A.1), and
the most reward at a divergence is that of the reference tilted by the reward. Training is the project's own step.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ray.config.objective import SigmoidObjective
from dpo_ray.config.train import OptimizerConfig, TrainConfig
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.micro_batch import Group, pack
from dpo_ray.train.optimizer import build_optimizer, set_learning_rate
from dpo_ray.train.step import train_step

PROMPTS, VOCABULARY, LENGTH = 4, 6, 5
BETA, PAIRS, EPOCHS, PAIRS_PER_STEP = 0.3, 20_000, 10, 250
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, decay="linear", warmup_fraction=0.0, max_grad_norm=None)
CONFIG = TrainConfig(objective=SigmoidObjective(beta=BETA), optimizer=OPTIMIZER, groups_per_step=PAIRS_PER_STEP)
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [7776, 5]


@dataclass(frozen=True)
class World:
    """Log-probs of the reference and rewards of all responses, float64 [prompts, 7776]."""

    reference: Tensor
    reward: Tensor

    def objective(self, policy: Tensor) -> float:
        """E[r] - beta KL, over all prompts alike."""
        return reward_of(policy, self.reward) - BETA * divergence(policy, self.reference)

    def optimum(self) -> float:
        """beta log Z"""
        return BETA * float((self.reference + self.reward / BETA).logsumexp(-1).mean())

    def frontier(self, kl: float) -> float:
        """Find the most reward at a divergence: that of reference * exp(r / b), for the b that has it, by bisection."""
        low, high = 1e-3, 1e3
        for _ in range(100):
            b = (low * high) ** 0.5
            low, high = (b, high) if divergence(self.tilted(b), self.reference) > kl else (low, b)
        return reward_of(self.tilted(low), self.reward)

    def tilted(self, b: float) -> Tensor:
        """log of reference * exp(r / b) / Z"""
        return (self.reference + self.reward / b).log_softmax(-1)


def reward_of(policy: Tensor, reward: Tensor) -> float:
    return float((policy.exp() * reward).sum(-1).mean())


def divergence(policy: Tensor, reference: Tensor) -> float:
    return float((policy.exp() * (policy - reference)).sum(-1).mean())


def policy_of(seed: int) -> TokenLogps:
    """Make a small Llama that reads prompts as tokens of their own, which it cannot say."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY + PROMPTS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    model.set_output_embeddings(nn.Linear(64, VOCABULARY, bias=False))
    return TokenLogps(model, chunk_tokens=2 * PAIRS_PER_STEP * LENGTH, layout="padded").train()


def rows_of(prompts: np.ndarray, responses: np.ndarray, reference: np.ndarray | None = None) -> PackedRows:
    """Pack for each of n prompts K responses [n, K, 5], the preferred one of two first, with the reference's log-probs."""
    chosen, rejected = (np.array([k] if responses.shape[1] == 2 else []) for k in (0, 1))
    groups = [
        Group(
            group_id=b"",
            prompt_ids=np.array([VOCABULARY + prompts[i]]),
            completion_ids=tuple(responses[i]),
            chosen=chosen,
            rejected=rejected,
            scores=-np.arange(responses.shape[1]),
            reference_token_logps=None if reference is None else tuple(reference[i]),
        )
        for i in range(len(prompts))
    ]
    return packed_rows(pack(groups), layout="padded")


@torch.no_grad()
def token_table(policy: TokenLogps) -> Tensor:
    """Score every token of every response to every prompt: float32 [prompts, 7776, 5]."""
    every = [rows_of(np.full(len(RESPONSES), p), RESPONSES[:, None].numpy()) for p in range(PROMPTS)]
    return torch.stack([policy(rows).logps.view(-1, LENGTH) for rows in every])


def make_reference(seed: int, generator: torch.Generator) -> TokenLogps:
    """Fit samples of a Markov chain for each prompt, for a model that is neither uniform nor untrained."""
    first = torch.randn(PROMPTS, VOCABULARY, generator=generator).softmax(-1)
    chain = torch.randn(PROMPTS, VOCABULARY, VOCABULARY, generator=generator).softmax(-1)
    policy = policy_of(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for _ in range(300):
        prompts = torch.randint(PROMPTS, (128,), generator=generator)
        tokens = [torch.multinomial(first[prompts], 1, generator=generator)[:, 0]]
        while len(tokens) < LENGTH:
            tokens.append(torch.multinomial(chain[prompts, tokens[-1]], 1, generator=generator)[:, 0])
        optimizer.zero_grad()
        rows = rows_of(prompts.numpy(), torch.stack(tokens, 1)[:, None].numpy())
        (-policy(rows).logps.mean()).backward()
        optimizer.step()
    return policy


def make_reward(reference: Tensor, generator: torch.Generator) -> Tensor:
    """Add up random values of tokens at their places, and for each prompt of neighbours: mean 0, deviation 1.

    Both under the reference: so its own E[r] - beta KL is 0, and a share of the optimum means something.
    """
    place = torch.randn(LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    neighbours = torch.randn(PROMPTS, VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64) / 2
    reward = place[torch.arange(LENGTH), RESPONSES].sum(-1) + neighbours[:, RESPONSES[:, :-1], RESPONSES[:, 1:]].sum(-1)
    reward = reward - (reference.exp() * reward).sum(-1, keepdim=True)
    return reward / (reference.exp() * reward**2).sum(-1, keepdim=True).sqrt()  # [prompts, 7776]


@cache
def trained(seed: int) -> tuple[World, Tensor]:
    """Draw pairs from the reference, label them by Bradley-Terry, train; the world and the policy's log-probs of it."""
    generator = torch.Generator().manual_seed(100 + seed)
    policy = make_reference(seed, generator)
    known = token_table(policy)
    reference = known.double().sum(-1)
    world = World(reference, make_reward(reference, generator))

    prompts = torch.randint(PROMPTS, (PAIRS,), generator=generator)
    drawn = torch.multinomial(reference.exp()[prompts].float(), 2, replacement=True, generator=generator)  # [pairs, 2]
    margin = world.reward[prompts, drawn[:, 0]] - world.reward[prompts, drawn[:, 1]]
    first_wins = torch.rand(PAIRS, generator=generator, dtype=torch.float64) < margin.sigmoid()
    drawn = torch.where(first_wins[:, None], drawn, drawn.flip(1))  # the preferred one first

    optimizer, total_steps = build_optimizer(policy, OPTIMIZER), EPOCHS * PAIRS // PAIRS_PER_STEP
    for step in range(total_steps):
        at = torch.arange(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP) % PAIRS
        p, pair = prompts[at], drawn[at]
        rows = rows_of(p.numpy(), RESPONSES[pair].numpy(), known[p[:, None], pair].numpy())
        set_learning_rate(optimizer, step, total_steps, OPTIMIZER)
        train_step(policy, [rows], CONFIG, optimizer)
    return world, token_table(policy).double().sum(-1)


def share_of_optimum(seed: int) -> float:
    world, policy = trained(seed)
    return world.objective(policy) / world.optimum()


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(3))
def test_most_of_the_optimum_is_reached_and_nothing_beyond_the_frontier(seed: int) -> None:
    world, policy = trained(seed)
    for table in (world.reference, policy):  # every response there is
        assert table.exp().sum(-1).tolist() == pytest.approx([1.0] * PROMPTS, abs=1e-4)
    assert world.objective(world.reference) == pytest.approx(0.0, abs=1e-5)  # float32 log-probs sum to 1 within 1e-6
    assert reward_of(policy, world.reward) <= world.frontier(divergence(policy, world.reference))
    assert 0.70 <= share_of_optimum(seed) <= 1.0


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_median_share_of_the_optimum() -> None:
    assert statistics.median(share_of_optimum(seed) for seed in range(3)) >= 0.80
