"""A small Llama over prompts of one token and responses of five tokens of six, and its training by the project's own step."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ray.config.objective import SigmoidObjective
from dpo_ray.config.train import OptimizerConfig, TrainConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.micro_batch import pack
from dpo_ray.train.optimizers.build import build_optimizer, set_learning_rate
from dpo_ray.train.step import train_step

PROMPTS, VOCABULARY, LENGTH, PAIRS_PER_STEP = 4, 6, 5, 250
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [7776, 5]
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, decay="linear", warmup_fraction=0.0, max_grad_norm=None)


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


@cache
def _every_response() -> list[PackedRows]:
    parts = RESPONSES.split(972)  # activations of a part stay in the CPU's cache: 1.5 times as fast as all at once
    return [rows_of(np.full(len(part), p), part[:, None].numpy()) for p in range(PROMPTS) for part in parts]


@torch.no_grad()
def token_table(policy: TokenLogps) -> Tensor:
    """Score every token of every response to every prompt: float32 [prompts, 7776, 5]."""
    return torch.cat([policy(rows).logps for rows in _every_response()]).view(PROMPTS, -1, LENGTH)


def exact(token_logps: Tensor) -> Tensor:
    """Add up tokens to log-probs of responses, float64, and take out float32's rounding: they sum to 1.

    Raises:
        ValueError: they are further from 1 than rounding explains; not all responses are there, or not their log-probs.
    """
    logps = token_logps.double().sum(-1)
    off = logps.logsumexp(-1).abs().max()
    if off > 1e-4:
        raise ValueError(f"log-probs of all responses sum to 1 only within {off:.2g}")
    return logps.log_softmax(-1)


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


def draw_pairs(policy: Tensor, reward: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw prompts [count] and for each two responses from the policy's table [count, 2], the one preferred by Bradley-Terry first."""
    prompts = torch.randint(PROMPTS, (count,), generator=generator)
    drawn = torch.multinomial(policy.exp()[prompts].float(), 2, replacement=True, generator=generator)
    margin = reward[prompts, drawn[:, 0]] - reward[prompts, drawn[:, 1]]
    first_wins = torch.rand(count, generator=generator, dtype=torch.float64) < margin.sigmoid()
    return prompts, torch.where(first_wins[:, None], drawn, drawn.flip(1))


def aligned(
    reference: TokenLogps,
    known: Tensor,
    reward: Tensor,
    beta: float,
    *,
    rounds: int,
    pairs: int,
    epochs: int,
    generator: torch.Generator,
) -> Tensor:
    """Train a copy of the reference by DPO; return the log-probs of all responses.

    Each round draws its part of the pairs from the policy as it is, and trains on all that were drawn so far: of one round,
    this is offline DPO on pairs of the reference. The steps are as many whatever the rounds: `epochs` of all the pairs.

    Args:
        known: the reference's own token_table.
    """
    policy = deepcopy(reference)
    config = TrainConfig(objective=SigmoidObjective(beta=beta), optimizer=OPTIMIZER, groups_per_step=PAIRS_PER_STEP)
    optimizer, total_steps = build_optimizer(policy, OPTIMIZER), epochs * pairs // PAIRS_PER_STEP
    batches: list[PackedRows] = []
    for step in range(total_steps):
        if step % (total_steps // rounds) == 0:
            prompts, drawn = draw_pairs(exact(token_table(policy)), reward, pairs // rounds, generator)
            for at in torch.arange(pairs // rounds).split(PAIRS_PER_STEP):
                p, pair = prompts[at], drawn[at]
                batches.append(rows_of(p.numpy(), RESPONSES[pair].numpy(), known[p[:, None], pair].numpy()))
        set_learning_rate(optimizer, step, total_steps, OPTIMIZER)
        train_step(policy, [batches[step % len(batches)]], config, optimizer)
    return exact(token_table(policy))
