"""Training tasks small enough for a test: the built-in model, and pairs with the reference's log-probs in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dpo_ray.config.train import OptimizerConfig, TrainConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.builtin import builtin_model
from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.build import Packing, pack_step
from dpo_ray.schedule.files import RankStep
from dpo_ray.schedule.micro_batch import pack
from dpo_ray.train.loop import Heldout

LEARNING_RATE, STEPS, GROUPS_PER_STEP = 2e-3, 6, 4


def make_policy(chunk_tokens: int = 1024) -> TokenLogps:
    return load_policy(builtin_model("sentiment_llama"), torch.float32, chunk_tokens).train()


def optimizer_config(**changes: object) -> OptimizerConfig:
    """Configure an optimizer that moves the weights visibly, and whose eps keeps rounding noise from moving them."""
    facts = {"learning_rate": LEARNING_RATE, "eps": 1e-4, "warmup_fraction": 0.0, "weight_decay": 0.01}
    return OptimizerConfig(**{**facts, **changes})


def make_config(**changes: object) -> TrainConfig:
    return TrainConfig(**{"optimizer": optimizer_config(), "groups_per_step": GROUPS_PER_STEP, **changes})


def make_groups(count: int, seed: int = 0) -> list[Group]:
    """Make pairs of random ids; the reference is somewhat off the policy, so that margins are not all 0."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        lengths = rng.integers(1, 12, 2)
        group = Group(
            group_id=rng.bytes(16),
            prompt_ids=rng.integers(3, 700, rng.integers(1, 15), dtype=np.int32),
            completion_ids=tuple(rng.integers(3, 700, n, dtype=np.int32) for n in lengths),
            scores=np.array([1, 0] if number % 2 else [0, 1], np.float32),
            chosen=np.array([0 if number % 2 else 1]),
            rejected=np.array([1 if number % 2 else 0]),
            weight=[1.0, 0.5][number % 2],
        )
        groups.append(group)
    return with_reference(groups)


@torch.no_grad()
def with_reference(groups: Sequence[Group]) -> list[Group]:
    policy, known = make_policy().eval(), []
    rng = np.random.default_rng(1)
    for group in groups:
        logps = policy(packed_rows(pack([group]))).logps.numpy()
        noisy = (logps - 0.2 * rng.random(len(logps))).astype(np.float32)
        known.append(replace(group, reference_token_logps=tuple(np.split(noisy, [len(group.completion_ids[0])]))))
    return known


def rank_steps(world: int, rank: int, tokens_per_micro_batch: int = 80) -> list[RankStep]:
    """Pack the same STEPS steps for a rank of a world."""
    groups = make_groups(STEPS * GROUPS_PER_STEP)
    members = [groups[n * GROUPS_PER_STEP : (n + 1) * GROUPS_PER_STEP] for n in range(STEPS)]
    return [rank_step(n, step, world, rank, tokens_per_micro_batch) for n, step in enumerate(members)]


def rank_step(number: int, groups: Sequence[Group], world: int, rank: int, tokens_per_micro_batch: int) -> RankStep:
    weight, tokens, ranks = pack_step(groups, Packing(world, tokens_per_micro_batch))
    return RankStep(number, weight, tokens, tuple(ranks[rank]))


def heldout_sets(world: int, rank: int) -> Heldout:
    """Hold out the first two steps, and as a second set a single pair: of two ranks, one has nothing of it."""
    single = [rank_step(0, make_groups(1, seed=5), world, rank, 80)]
    return {"eval_first": lambda: rank_steps(world, rank)[:2], "eval_single": lambda: single}


def rows_of(groups: Sequence[Group]) -> PackedRows:
    return packed_rows(pack(groups))


def weights_of(policy: TokenLogps) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of weights, the worst over the parameters."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)
