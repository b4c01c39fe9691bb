"""Replay the dealing of steps to ranks: made-up lengths, the project's own `deal`, no token anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ray.models.work import ModelShape
from dpo_ray.schedule.order import deal, estimate_work

TOKENS_PER_MICRO_BATCH = 8192  # the default of train.tokens_per_micro_batch
SHAPE_7B = ModelShape(  # Llama 7B: 32 blocks, width 4,096, feed-forward 11,008, vocabulary 32,000
    frozen_weights=0,
    trained_weights=32 * (4 * 4096**2 + 3 * 4096 * 11008),
    head_weights=32_000 * 4096,
    head_is_trained=True,
    attention_width=32 * 4096,
)
SAMPLED_GROUPS = 16_384  # a case's steps hold so many groups together, within the next two bounds
LEAST_STEPS, MOST_STEPS = 1, 32


@dataclass(frozen=True)
class Lengths:
    """Log-normal numbers of tokens, cut as `data.truncation=keep_start` cuts: a prompt and two completions."""

    name: str
    medians: tuple[float, float, float]  # prompt, chosen, rejected
    deviations: tuple[float, float, float]  # of the logarithm
    max_length_tokens: int

    def draw(self, groups: int, seed: int) -> np.ndarray:
        """Draw the tokens of prompt, chosen and rejected: int64 [groups, 3]."""
        rng = np.random.default_rng(seed)
        drawn = np.ceil(rng.lognormal(np.log(self.medians), self.deviations, (groups, 3))).astype(np.int64)
        drawn[:, 0] = np.minimum(drawn[:, 0], self.max_length_tokens - 1)
        drawn[:, 1:] = np.minimum(drawn[:, 1:], self.max_length_tokens - drawn[:, :1])
        return drawn


def _deviation(median: float, percentile_95: float) -> float:
    return math.log(percentile_95 / median) / 1.645


# Medians and 95th percentiles of HH-RLHF's harmless-base dialogues, as `dialogues.py` measured them.
HH = Lengths("HH-like", (101, 29, 39), (_deviation(101, 376), _deviation(29, 131), _deviation(39, 170)), 1024)
# Wang & Hegde (2024, 2410.20305) have a median of 409 tokens a sequence, prompt : completion = 0.42; deviations are assumed.
ULTRAFEEDBACK = Lengths("UltraFeedback-like", (121, 288, 288), (1.0, 0.7, 0.7), 2048)


@dataclass(frozen=True)
class Case:
    """Steps of one size on so many ranks."""

    lengths: Lengths
    ranks: int
    groups_per_step: int

    @property
    def steps(self) -> int:
        """Return how many steps are replayed."""
        return min(MOST_STEPS, max(LEAST_STEPS, SAMPLED_GROUPS // self.groups_per_step))


@dataclass(frozen=True)
class Balance:
    """What the ranks of one step have to do: means over the replayed steps of a case."""

    steps: int
    micro_batches: float  # of each rank: they are equally many
    fillers: float  # share of the micro-batches that hold no group
    unused: float  # share of the micro-batches' token budget that holds no token
    estimate: float  # most of a rank over the mean, by the unit that `deal` balances
    flops: float  # the same by the floating-point operations of a 7B model
    lockstep: float  # the same where ranks wait for each other after every micro-batch, as they do under FSDP
    worst_lockstep: float  # of all replayed steps


def replay(case: Case, seed: int = 0) -> Balance:
    """Deal a case's steps and measure them."""
    lengths = case.lengths.draw(case.steps * case.groups_per_step, seed)
    measured = [
        measure(step, case.ranks, TOKENS_PER_MICRO_BATCH) for step in lengths.reshape(-1, case.groups_per_step, 3)
    ]
    micro_batches, fillers, unused, estimate, flops, lockstep = np.mean(measured, axis=0).tolist()
    worst = max(step[-1] for step in measured)
    return Balance(case.steps, micro_batches, fillers, unused, estimate, flops, lockstep, worst)


def dealt(lengths: np.ndarray, ranks: int, budget: int) -> list[list[list[int]]]:
    """Deal one step as `pack_step` does, given only its groups' lengths: [ranks][micro-batches][groups]."""
    work = [estimate_work(prompt, completions) for prompt, *completions in lengths.tolist()]
    return deal(lengths.sum(axis=1).tolist(), work, ranks, budget)


def measure(lengths: np.ndarray, ranks: int, budget: int) -> tuple[float, float, float, float, float, float]:
    """Deal one step; returns its micro-batches a rank, and the rest of `Balance` in that order.

    A filler counts as no work: it is three tokens.
    """
    step = dealt(lengths, ranks, budget)
    micro_batches = len(step[0])
    rows = lengths.tolist()
    by_estimate = _loads(step, [estimate_work(prompt, completions) for prompt, *completions in rows])
    by_flops = _loads(step, [SHAPE_7B.flops(prompt, completions) for prompt, *completions in rows])
    tokens = int(lengths.sum())
    return (
        micro_batches,
        sum(not batch for batches in step for batch in batches) / (ranks * micro_batches),
        # A group that is longer than the budget has a micro-batch of its own, of its own length.
        1 - tokens / float(np.maximum(_loads(step, lengths.sum(axis=1).tolist()), budget).sum()),
        _most_over_mean(by_estimate.sum(axis=1)),
        _most_over_mean(by_flops.sum(axis=1)),
        float(by_flops.max(axis=0).sum() / by_flops.sum(axis=1).mean()),
    )


def _loads(step: Sequence[Sequence[Sequence[int]]], amounts: Sequence[float]) -> np.ndarray:
    """Add up the groups' amounts: float64 [ranks, micro-batches]."""
    return np.array([[sum(amounts[i] for i in batch) for batch in batches] for batches in step], np.float64)


def _most_over_mean(loads: np.ndarray) -> float:
    return float(loads.max() / loads.mean())


def cases(worlds: Sequence[int], groups_per_rank: Sequence[int], fixed_groups: int) -> Iterator[Case]:
    """Yield every world size with so many groups a rank, and with the same `fixed_groups` a step whatever the world."""
    for lengths in (HH, ULTRAFEEDBACK):
        for ranks in worlds:
            for groups_per_step in dict.fromkeys([fixed_groups, *(each * ranks for each in groups_per_rank)]):
                yield Case(lengths, ranks, groups_per_step)
