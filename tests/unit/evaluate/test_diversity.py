"""Diversity of completions, by hand."""

from __future__ import annotations

import math

import pytest

from dpo_ray.evaluate.diversity import distinct_n, mean_tokens, unigram_entropy


def test_distinct_n() -> None:
    completions = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n(completions, 1) == pytest.approx(3 / 7)
    assert distinct_n(completions, 2) == pytest.approx(3 / 5)  # 12 21 12, 12 23: none across completions
    assert distinct_n(completions, 4) == 1.0
    assert distinct_n(completions, 5) is None
    assert distinct_n([], 1) is None


def test_a_collapsed_policy_shows() -> None:
    assert distinct_n([[7] * 9] * 4, 2) == pytest.approx(1 / 32)
    assert unigram_entropy([[7] * 9] * 4) == 0.0


def test_mean_tokens() -> None:
    assert mean_tokens([[1], [1, 2, 3], []]) == pytest.approx(4 / 3)
    assert mean_tokens([]) is None


def test_entropy_is_that_of_the_pooled_tokens() -> None:
    assert unigram_entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert unigram_entropy([[1, 1], [1, 2]]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert unigram_entropy([[1] * 5 + [2] * 3, [3, 4]]) == pytest.approx(1.1682824501765625)  # scipy.stats.entropy
    assert unigram_entropy([[], []]) is None
