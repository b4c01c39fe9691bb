"""Measures of how varied a policy's completions are; they fall when a policy collapses onto a few phrases.

All three depend on the number of tokens, so compare policies only on the same prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float | None:
    """Return the share of distinct n-grams among all n-grams (Li et al., 2016); None if no completion has n tokens."""
    grams = [tuple(ids[k : k + n]) for ids in completions for k in range(len(ids) - n + 1)]
    return len({*grams}) / len(grams) if grams else None


def mean_tokens(completions: Sequence[Sequence[int]]) -> float | None:
    """Return the mean number of tokens of a completion; None without completions."""
    return sum(map(len, completions)) / len(completions) if completions else None


def unigram_entropy(completions: Sequence[Sequence[int]]) -> float | None:
    """Return the entropy in nats of a token drawn uniformly from all completions' tokens; None without tokens."""
    counts = np.array([*Counter(token for ids in completions for token in ids).values()], float)
    shares = counts / counts.sum() if len(counts) else counts
    return float(-(shares * np.log(shares)).sum()) + 0.0 if len(shares) else None
