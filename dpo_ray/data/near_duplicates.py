"""Finds near duplicates: computes MinHash signatures of groups, and searches for groups whose signatures are similar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] - compiled, and without type stubs

if TYPE_CHECKING:  # importing the tokenizers takes seconds
    from .groups import TokenGroup

GRAM_TOKENS = 5
PERMUTATIONS = 128
SEED = 20_240_726
SIGNATURE_DTYPE = np.dtype("<u2")
"""The lower half of each 32-bit minimum is kept. Two different minima have the same lower half once in 65,536 times,
which has no noticeable effect on an estimate over 128 minima, and the search over all rows needs half the memory."""

MINHASH_VERSION = f"rensa-{RMinHash.ALGORITHM_VERSION}/{GRAM_TOKENS}/{PERMUTATIONS}/{SEED}"
"""Part of the key of every artifact that stores signatures. Signatures of different versions must not be compared."""

RECALL = 0.98  # the bands must find this share of the pairs whose similarity is exactly the threshold
MAX_LEADERS = 1024  # rows of a bucket that others are compared with; limits the time if many texts share a frame

_ROWS_AT_ONCE = 128  # few enough that their grams stay in the processor's cache
_SIGNATURES_AT_ONCE = 1 << 15
_MULTIPLIERS = np.array(  # odd, of random bits
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


def minhash(token_ids: np.ndarray) -> bytes:
    """Compute the MinHash signature of a text (256 bytes) from the set of its token 5-grams.

    The signature is the same on every machine. A text of fewer than five tokens counts as one 5-gram.
    """
    return _signatures([token_ids])[0].tobytes()


def minhashes(groups: Sequence[TokenGroup]) -> list[bytes]:
    """Compute the signature of each group, whose prompt and completions are taken as one text.

    The rank (or label) of a completion is added to its token ids, so that the same completion with another rank counts as a
    different text. So a preference and its opposite have only the 5-grams of their prompts in common.
    """
    texts = [
        np.concatenate([g.prompt_ids, *map(_ranked, g.completion_ids, _ranks(g))]).astype(np.int64) for g in groups
    ]
    blocks = [_signatures(texts[i : i + _ROWS_AT_ONCE]) for i in range(0, len(texts), _ROWS_AT_ONCE)]
    return [signature.tobytes() for block in blocks for signature in block]


def _ranks(group: TokenGroup) -> list[int]:
    """Return the ranks of a group's completions, 0 for the best. The rank of a single completion is its label: 0 good, 1 bad."""
    return [int(group.scores[0] < 0.5)] if len(group.completion_ids) == 1 else list(range(len(group.completion_ids)))


def _ranked(token_ids: np.ndarray, rank: int) -> np.ndarray:
    return np.asarray(token_ids, np.int64) + (rank << 32)  # ids of other ranks are beyond every vocabulary


def _signatures(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the signatures of texts: [n, PERMUTATIONS] of SIGNATURE_DTYPE.

    The method is "Fast Similarity Sketching" (Dahlgaard, Knudsen, Thorup; arXiv 1704.04370). The share of positions at
    which two signatures have the same value estimates the Jaccard similarity J of the two sets of 5-grams, with a
    standard error of at most sqrt(J * (1 - J) / PERMUTATIONS).
    """
    grams, offsets = _gram_hashes(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets, num_perm=PERMUTATIONS, seed=SEED)
    minima = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), PERMUTATIONS)
    return (minima & 0xFFFF).astype(SIGNATURE_DTYPE)


def _gram_hashes(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the hashes of all 5-grams, uint64 [grams], and offsets; text i has the hashes offsets[i]:offsets[i + 1]."""
    lengths = np.array([max(len(text), GRAM_TOKENS) for text in texts])
    ends = np.cumsum(lengths)
    tokens = np.zeros(ends[-1] + GRAM_TOKENS - 1, np.uint64)
    for end, length, text in zip(ends, lengths, texts, strict=True):
        start = end - length
        tokens[start : start + len(text)] = text
        tokens[start : start + len(text)] += np.uint64(1)  # 0 marks the places where a short text has no token
    hashes = tokens[: ends[-1]] * _MULTIPLIERS[0]
    for k in range(1, GRAM_TOKENS):
        hashes += tokens[k : ends[-1] + k] * _MULTIPLIERS[k]
    hashes ^= hashes >> np.uint64(32)  # only the upper bits of a sum of products are good: mix them into the lower ones
    hashes *= _MULTIPLIERS[0]
    hashes ^= hashes >> np.uint64(29)
    within = np.ones(len(hashes), bool)
    within[(ends[:, None] - np.arange(1, GRAM_TOKENS)).ravel()] = False  # grams that would reach into the next text
    grams = lengths - GRAM_TOKENS + 1
    return hashes[within], np.concatenate([[0], np.cumsum(grams)]).astype(np.uint64)


def near_duplicates(minhashes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Find the rows to exclude, so that the remaining rows are not similar to each other.

    Two rows are similar if their signatures have the same value at a share of at least `threshold` of the positions. A
    band is a range of positions. Two rows are only compared if they have the same values at all positions of a band
    (locality-sensitive hashing). In this way a pair whose similarity is exactly the threshold is found with a
    probability of at least 98% (RECALL), and a more similar pair with a higher probability. An excluded row is similar
    to an earlier row; that row may itself be excluded because it is similar to a still earlier row.

    Args:
        minhashes: [n, PERMUTATIONS] of SIGNATURE_DTYPE.
        order: [m] the rows to compare; the first of several similar rows is kept.
        threshold: Jaccard similarity, above 0 and at most 1.

    Returns:
        [k] the rows of `order` to exclude.
    """
    enough = math.ceil(threshold * PERMUTATIONS - 1e-9)
    band = band_width(threshold)
    staying = order
    for start in range(0, PERMUTATIONS - band + 1, band):
        staying = staying[~_similar_within_band(minhashes, staying, slice(start, start + band), enough)]
    gone = np.zeros(len(minhashes), bool)
    gone[order] = True
    gone[staying] = False
    return np.flatnonzero(gone)


def band_width(threshold: float) -> int:
    """Return how many positions of the signatures form a band.

    The result is the largest number for which the search still finds 98% (RECALL) of all pairs whose similarity is
    exactly `threshold`.
    """
    for width in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL:
            return width
    return 1


def _similar_within_band(minhashes: np.ndarray, rows: np.ndarray, band: slice, enough: int) -> np.ndarray:
    """Return bool [rows], True for a row to exclude: it is similar to an earlier row with the same values in the band.

    Rows with the same values in the band form a bucket. First the rows that are similar to the first row of their bucket
    are excluded, then those similar to the first of the remaining rows, and so on; all buckets are processed at once.
    """
    _, bucket, sizes = np.unique(_band_keys(minhashes, band)[rows], return_inverse=True, return_counts=True)
    places = np.flatnonzero(sizes[bucket] > 1)
    places = places[np.argsort(bucket[places], kind="stable")]  # by bucket, and within it in the order of the rows
    bucket = bucket[places]
    gone = np.zeros(len(rows), bool)
    for _ in range(MAX_LEADERS):
        leads = np.diff(bucket, prepend=-1) != 0
        if leads.all():
            break
        leader = places[leads][np.cumsum(leads) - 1][~leads]
        places, bucket = places[~leads], bucket[~leads]
        similar = _agreements(minhashes, rows[places], rows[leader]) >= enough
        gone[places[similar]] = True
        places, bucket = places[~similar], bucket[~similar]
    return gone


def _band_keys(minhashes: np.ndarray, band: slice) -> np.ndarray:
    """Compute a hash of each row's values in the band, uint64 [n]. A collision only costs an extra comparison."""
    multipliers = np.random.default_rng(SEED).integers(2**63, size=band.stop - band.start, dtype=np.uint64) * 2 + 1
    keys = np.empty(len(minhashes), np.uint64)
    for start in range(0, len(minhashes), _SIGNATURES_AT_ONCE):
        block = slice(start, start + _SIGNATURES_AT_ONCE)
        keys[block] = minhashes[block, band].astype(np.uint64) @ multipliers
    return keys


def _agreements(minhashes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Count, for each i, at how many positions rows a[i] and b[i] have the same value. Blocks of rows limit the memory."""
    counts = np.empty(len(a), np.int16)
    for start in range(0, len(a), _SIGNATURES_AT_ONCE):
        block = slice(start, start + _SIGNATURES_AT_ONCE)
        counts[block] = np.count_nonzero(minhashes[a[block]] == minhashes[b[block]], axis=1)
    return counts
