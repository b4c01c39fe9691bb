"""What is said about a finished policy: pure functions of held-out log-probs and of samples."""

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
    ended: bool  # with an end-of-turn token, rather than by the limit


@dataclass(frozen=True)
class Comparison:
    """Completions of the same prompts, sampled from the policy and from the reference."""

    prompt_ids: tuple[tuple[int, ...], ...]
    policy: tuple[Sample, ...]
    reference: tuple[Sample, ...]


def heldout_by_set(table: pa.Table) -> dict[str, dict[str, float]]:
    """Give the figures of each named held-out set by its name; none where held-out data is not in sets.

    The table's column `split` says `eval_NAME` of a set's pairs, and `eval` of held-out data without a name.
    """
    splits = np.array(table["split"].to_pylist())
    return {
        split.removeprefix(f"{EVAL}_"): heldout_figures(table.take(np.flatnonzero(splits == split)))
        for split in sorted({*splits.tolist()} - {EVAL})
    }


def heldout_figures(table: pa.Table) -> dict[str, float]:
    """Average held-out pairs by weight: loss, rewards, margin, accuracy with its standard error, and "longer wins".

    `longer_wins` is the accuracy of preferring the longer completion: what length alone explains. Of unpaired data, a row of
    which is one completion with NaN on the side it is not of, there is neither; the margin is the difference of the sides.
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
    """Estimate KL(policy || reference) per completion from the policy's own samples, and compare lengths.

    KL = E[log pi(y) - log pi_ref(y)], y ~ pi: unbiased at temperature 1; for completions cut off by the limit it is the
    KL of what was sampled. Its standard error is that of the mean.
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
    """Compare true rewards of the same prompts' completions; `true_reward_gain_in_sd` is in the reference's deviations."""
    p, r = np.asarray(policy, float), np.asarray(reference, float)
    gain = p - r
    return {
        "policy_true_reward": float(p.mean()),
        "reference_true_reward": float(r.mean()),
        "true_reward_gain": float(gain.mean()),
        "true_reward_gain_standard_error": float(gain.std(ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else 0.0,
        "true_reward_gain_in_sd": float(gain.mean() / r.std()) if r.std() > 0 else 0.0,
    }


def _mean(values) -> float:
    listed = [float(v) for v in values]
    return sum(listed) / len(listed) if listed else 0.0
