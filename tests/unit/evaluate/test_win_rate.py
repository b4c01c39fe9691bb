"""Win rates and mean differences: counts by hand; intervals by SciPy, enumeration, Wilson's formula and simulation."""

from __future__ import annotations

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from dpo_ray.evaluate import win_rate as module
from dpo_ray.evaluate.win_rate import MeanDifference, WinRate, mean_difference, win_rate

SAMPLES = 4000
# scipy.stats.bootstrap of SciPy 1.17.1, method="percentile", 400,000 resamples.
GAPS = [0.5, -1.0, 3.0, 2.25, -0.25, 0.75, 0.0, -2.5, 1.5, 4.0, -0.5, 0.25]
SCIPY_OF_GAPS = {0.8: (0.0416667, 1.3125), 0.95: (-0.2916667, 1.6458333)}
SCIPY_OF_21_WINS_9_TIES_15_LOSSES = (0.4333333, 0.6888889)


def test_counts_and_rate() -> None:
    ours = [1.0, 2.0, 3.0, None, 5.0, math.nan, 7.0]
    theirs = [0.0, 2.0, 4.0, 1.0, None, 1.0, 1.0]
    result = win_rate(ours, theirs, SAMPLES, 0.95, 0)
    assert (result.wins, result.ties, result.losses, result.abstained) == (2, 1, 1, 3)
    assert result.rate == 2.5 / 4
    assert result.low is not None
    assert result.high is not None
    assert 0 <= result.low <= result.rate <= result.high <= 1


def test_without_judged_prompts_there_is_no_rate() -> None:
    assert win_rate([None, 1.0], [1.0, None], SAMPLES, 0.95, 0) == WinRate(0, 0, 0, 2, None, None, None)
    assert win_rate([], [], SAMPLES, 0.95, 0) == WinRate(0, 0, 0, 0, None, None, None)
    assert mean_difference([None], [1.0], SAMPLES, 0.95, 0) == MeanDifference(0, None, None, None)


def test_prompts_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        win_rate([1.0], [1.0, 2.0], SAMPLES, 0.95, 0)


def test_the_seed_is_all_the_chance_there_is() -> None:
    scores = np.random.default_rng(1).normal(size=(2, 50))
    first, again, other = (mean_difference(*scores, SAMPLES, 0.9, seed) for seed in (3, 3, 4))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_both_sides_mirror() -> None:
    scores = np.random.default_rng(2).normal(size=(2, 80)).round(1)
    there, back = win_rate(*scores, SAMPLES, 0.95, 0), win_rate(*scores[::-1], SAMPLES, 0.95, 0)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.rate == pytest.approx(1 - back.rate)
    assert (there.low, there.high) == (pytest.approx(1 - back.high), pytest.approx(1 - back.low))


@pytest.mark.parametrize("confidence", SCIPY_OF_GAPS)
def test_the_interval_is_scipys(confidence: float) -> None:
    result = mean_difference(GAPS, [0.0] * len(GAPS), 60_000, confidence, 0)
    assert (result.low, result.high) == pytest.approx(SCIPY_OF_GAPS[confidence], abs=0.03)
    rates = win_rate([2.0] * 21 + [1.0] * 9 + [0.0] * 15, [1.0] * 45, 60_000, 0.95, 0)
    assert (rates.low, rates.high) == pytest.approx(SCIPY_OF_21_WINS_9_TIES_15_LOSSES, abs=0.012)  # steps of 1/90


def test_the_interval_is_that_of_all_resamples() -> None:
    """Five prompts have 5^5 resamples: their quantiles are what drawing some of them estimates."""
    gaps = [0.5, -1.0, 3.0, 2.25, -0.25]
    means = sorted(sum(draw) / 5 for draw in product(gaps, repeat=5))
    result = mean_difference(gaps, [0.0] * 5, 60_000, 0.8, 0)
    assert result.mean == pytest.approx(sum(gaps) / 5)
    assert result.low == pytest.approx(np.quantile(means, 0.1), abs=0.03)
    assert result.high == pytest.approx(np.quantile(means, 0.9), abs=0.03)


@pytest.mark.parametrize(("wins", "losses"), [(600, 400), (1000, 1000), (1700, 300)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_at_many_prompts_it_is_wilsons_interval(wins: int, losses: int, confidence: float) -> None:
    n, p, z = wins + losses, wins / (wins + losses), NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    result = win_rate([1.0] * wins + [0.0] * losses, [0.5] * n, SAMPLES, confidence, 0)
    assert result.low == pytest.approx(middle - half, abs=0.08 * half)
    assert result.high == pytest.approx(middle + half, abs=0.08 * half)


def test_ties_narrow_the_interval() -> None:
    """One half has no spread: with half of the outcomes tied, the standard error is smaller by the root of two."""
    z, n = NormalDist().inv_cdf(0.975), 1000
    result = win_rate([1.0] * 250 + [0.5] * 500 + [0.0] * 250, [0.5] * n, SAMPLES, 0.95, 0)
    assert result.rate == 0.5
    assert result.low is not None
    assert 0.5 - result.low == pytest.approx(z * math.sqrt(1 / 8 / n), rel=0.08)


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_the_interval_covers_the_truth_as_often_as_it_says(rate: float) -> None:
    """400 experiments of 80 prompts at 90%: by chance between 84% and 95%, the interval's own defect included."""
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(400):
        ours = (rng.random(80) < rate).astype(float)
        result = win_rate(ours.tolist(), [0.5] * 80, 500, 0.9, seed)
        assert result.low is not None
        assert result.high is not None
        covered += result.low <= rate <= result.high
    assert 0.84 < covered / 400 < 0.95


def test_blocks_do_not_change_what_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(3).normal(size=(2, 200))
    whole = mean_difference(*scores, SAMPLES, 0.95, 0)
    monkeypatch.setattr(module, "VALUES_PER_BLOCK", 150)  # less than one resample: a block each
    blocks = mean_difference(*scores, SAMPLES, 0.95, 0)
    assert blocks == whole
