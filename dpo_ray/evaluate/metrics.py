"""Metrics of a trained policy, computed by pure functions from held-out log-probs and from sampled completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_ray.config.data import EVAL


@dataclass(frozen=True)
class Sample:
    """One completion sampled from a model, with its log-prob under the policy and under the reference (nats)."""

    token_ids: tuple[int, ...]
    policy_logp: float
    reference_logp: float
    ended: bool  # True: with an end-of-turn token; False: at the token limit


@dataclass(frozen=True)
class Comparison:
    """Completions that the policy and the reference sampled for the same prompts, in the order of the prompts."""

    prompt_ids: tuple[tuple[int, ...], ...]
    policy: tuple[Sample, ...]
    reference: tuple[Sample, ...]


def heldout_by_set(table: pa.Table) -> dict[str, dict[str, float]]:
    """Compute the metrics of each named held-out set. Return them by the name of the set; {} if no set has a name.

    Args:
        table: the held-out table that training wrote. The column `split` is `eval_NAME` for pairs of the set NAME, and
            `eval` for pairs of a set without a name.
    """
    splits = np.array(table["split"].to_pylist())
    return {
        split.removeprefix(f"{EVAL}_"): heldout_figures(table.take(np.flatnonzero(splits == split)))
        for split in sorted({*splits.tolist()} - {EVAL})
    }


def heldout_figures(table: pa.Table) -> dict[str, float]:
    """Compute weighted means over held-out pairs: loss, rewards, margin, accuracy, and `longer_wins`.

    `longer_wins` is the accuracy of a rule that always prefers the longer completion. It shows how much of the accuracy
    the length alone can explain.

    With unpaired data, a row is a single completion. If the completion is chosen, the columns of rejected are NaN, and
    vice versa. For unpaired data there is no accuracy and no `longer_wins`, and the margin is the mean chosen reward
    minus the mean rejected reward.
    """
    column = {name: table[name].to_numpy() for name in table.column_names if name != "split"}
    column["longer"] = np.sign(column["tokens_chosen"] - column["tokens_rejected"]) / 2 + 0.5
    known = {name: ~np.isnan(values) for name, values in column.items()}
    weight = column["weight"]
    mean = {
        name: float((values * weight)[known[name]].sum() / weight[known[name]].sum())
        for name, values in column.items()
        if known[name].any()
    }
    sides = [mean.get("reward_chosen", math.nan), mean.get("reward_rejected", math.nan)]
    figures = {
        "loss": mean["loss"],
        "rewards/chosen": sides[0],
        "rewards/rejected": sides[1],
        "rewards/margins": sides[0] - sides[1],
    }
    figures = {name: value for name, value in figures.items() if not math.isnan(value)}
    if "accurate" not in mean:
        return {"completions": float(len(table)), **figures}
    return {
        "pairs": float(len(table)),
        **figures,
        "rewards/accuracies": mean["accurate"],
        "accuracy_standard_error": math.sqrt(mean["accurate"] * (1 - mean["accurate"]) / len(table)),
        "longer_wins": mean["longer"],
    }


def sample_figures(comparison: Comparison) -> dict[str, float]:
    """Estimate KL(policy || reference) per completion, and compute the lengths of both models' completions.

    KL = E[log pi(y) - log pi_ref(y)], y ~ pi. The estimate is unbiased at temperature 1. If a completion was cut off at
    the token limit, only the sampled tokens count. `kl_standard_error` is the standard error of the mean.
    """
    ratios = np.array([s.policy_logp - s.reference_logp for s in comparison.policy])
    return {
        "samples": float(len(ratios)),
        "kl": float(ratios.mean()),
        "kl_standard_error": float(ratios.std(ddof=1) / math.sqrt(len(ratios))) if len(ratios) > 1 else 0.0,
        "policy_tokens": _mean(len(s.token_ids) for s in comparison.policy),
        "reference_tokens": _mean(len(s.token_ids) for s in comparison.reference),
        "policy_ended": _mean(s.ended for s in comparison.policy),
        "reference_ended": _mean(s.ended for s in comparison.reference),
    }


def reward_figures(policy: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Compare the true rewards of the policy's and the reference's completions of the same prompts.

    `true_reward_gain_in_sd` is the mean gain divided by the standard deviation of the reference's rewards.

    Args:
        policy: the reward of the policy's completion of each prompt.
        reference: the reward of the reference's completion of each prompt.
    """
    p, r = np.array(policy), np.array(reference)
    gain = p - r
    return {
        "policy_true_reward": float(p.mean()),
        "reference_true_reward": float(r.mean()),
        "true_reward_gain": float(gain.mean()),
        "true_reward_gain_standard_error": float(gain.std(ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else 0.0,
        "true_reward_gain_in_sd": float(gain.mean() / r.std()) if r.std() > 0 else 0.0,
    }


def _mean(values) -> float:
    floats = [float(v) for v in values]
    return sum(floats) / len(floats) if floats else 0.0
