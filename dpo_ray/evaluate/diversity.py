"""Measures of the length and variety of a policy's completions.

`distinct_n` and `unigram_entropy` fall when a policy repeats a few phrases. Both also depend on the number of tokens,
so compare two policies only on the same prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float | None:
    """Return the number of distinct n-grams divided by the number of all n-grams (Li et al., 2016).

    Return None if no completion has n tokens.
    """
    grams = [tuple(ids[k : k + n]) for ids in completions for k in range(len(ids) - n + 1)]
    return len({*grams}) / len(grams) if grams else None


def mean_tokens(completions: Sequence[Sequence[int]]) -> float | None:
    """Return the mean number of tokens per completion; None if there are no completions."""
    return sum(map(len, completions)) / len(completions) if completions else None


def unigram_entropy(completions: Sequence[Sequence[int]]) -> float | None:
    """Return the entropy (nats) of the frequencies of tokens over all completions; None if there are no tokens."""
    counts = np.array([*Counter(token for ids in completions for token in ids).values()], float)
    shares = counts / counts.sum() if len(counts) else counts
    return float(-(shares * np.log(shares)).sum()) + 0.0 if len(shares) else None
