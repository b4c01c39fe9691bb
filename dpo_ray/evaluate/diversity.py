"""How varied a policy's completions are: what falls when a policy collapses onto a few phrases.

All three depend on how many tokens there are, so compare policies on the same prompts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float | None:
    """Give the share of different n-grams among all of them (Li et al., 2016); None where no completion has n tokens."""
    grams = [tuple(ids[k : k + n]) for ids in completions for k in range(len(ids) - n + 1)]
    return len({*grams}) / len(grams) if grams else None


def mean_tokens(completions: Sequence[Sequence[int]]) -> float | None:
    """Give a completion's tokens on average; None without completions."""
    return sum(map(len, completions)) / len(completions) if completions else None


def unigram_entropy(completions: Sequence[Sequence[int]]) -> float | None:
    """Give the entropy in nats of the token that is drawn from all of them; None without tokens."""
    counts = np.array([*Counter(token for ids in completions for token in ids).values()], float)
    shares = counts / counts.sum() if len(counts) else counts
    return float(-(shares * np.log(shares)).sum()) + 0.0 if len(shares) else None
