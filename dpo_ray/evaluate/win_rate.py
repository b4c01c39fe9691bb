"""Comparison of two policies by the scores of their completions: win rate, mean difference, bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VALUES_PER_BLOCK = 4_000_000  # values drawn at once: 32 MB


@dataclass(frozen=True)
class WinRate:
    """Counts of the prompts on which our policy's completion wins, ties or loses against the other policy's completion.

    The completion with the higher score wins. The rate and its interval are None if no prompt has both scores.
    """

    wins: int
    ties: int
    losses: int
    abstained: int  # prompts for which at least one score is missing
    rate: float | None  # a tie counts one half
    low: float | None
    high: float | None


@dataclass(frozen=True)
class MeanDifference:
    """The mean of (our score - the other policy's score). Mean and interval are None if no prompt has both scores."""

    prompts: int
    mean: float | None
    low: float | None
    high: float | None


def win_rate(
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> WinRate:
    """Count the prompts on which our policy wins, and compute the win rate with a bootstrap interval.

    If all prompts have the same outcome, the interval has width 0 even for few prompts, so read it together with the
    counts.

    Args:
        ours: the score of our policy's completion for each prompt. None, NaN or infinity means that there is no score.
        theirs: the scores of the other policy for the same prompts.
        bootstrap_samples: number of bootstrap samples.
        confidence: confidence level of the interval, such as 0.95.
        seed: seed of the bootstrap.
    """
    gaps = _differences(ours, theirs)
    wins, ties, losses = (int((np.sign(gaps) == sign).sum()) for sign in (1, 0, -1))
    interval = _mean_interval(np.sign(gaps) / 2 + 0.5, bootstrap_samples, confidence, seed)
    return WinRate(wins, ties, losses, len(ours) - len(gaps), *interval)


def mean_difference(
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> MeanDifference:
    """Compute the mean of `ours - theirs`, with a bootstrap interval. The arguments are those of `win_rate`."""
    gaps = _differences(ours, theirs)
    return MeanDifference(len(gaps), *_mean_interval(gaps, bootstrap_samples, confidence, seed))


def _differences(ours: Sequence[float | None], theirs: Sequence[float | None]) -> np.ndarray:
    """Return `ours - theirs` for each prompt that has both scores."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return np.array([a - b for a, b in both if math.isfinite(a) and math.isfinite(b)], float)


def _mean_interval(
    values: np.ndarray, bootstrap_samples: int, confidence: float, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Return the mean of `values`, and the lower and upper end of its percentile bootstrap interval.

    If there are no values, all three are None.
    """
    if not len(values):
        return None, None, None
    rng = np.random.default_rng(seed)
    rows = max(1, VALUES_PER_BLOCK // len(values))
    sizes = [min(rows, bootstrap_samples - start) for start in range(0, bootstrap_samples, rows)]
    means = np.concatenate([values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in sizes])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean()), float(low), float(high)
