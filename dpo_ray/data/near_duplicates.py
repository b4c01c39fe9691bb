"""Near duplicates: MinHash signatures of groups, and the search for similar ones among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] - compiled, and without type stubs

if TYPE_CHECKING:  # tokenizers take seconds to import
    from .groups import TokenGroup

GRAM_TOKENS = 5
PERMUTATIONS = 128
SEED = 20_240_726
SIGNATURE_DTYPE = np.dtype("<u2")
"""Of each 32-bit minimum the lower half is kept: two that differ agree in it once in 65,536 times, which no estimate
over 128 of them notices, and the search over all rows needs half the memory."""

MINHASH_VERSION = f"rensa-{RMinHash.ALGORITHM_VERSION}/{GRAM_TOKENS}/{PERMUTATIONS}/{SEED}"
"""Signatures of two versions must not be compared: part of the key of whatever stores them."""

RECALL = 0.98  # of pairs that are exactly as similar as the threshold: the share that the bands must find
MAX_LEADERS = 1024  # of one bucket; bounds the time that text with a common frame takes

_ROWS_AT_ONCE = 128  # their grams stay in the processor's cache
_SIGNATURES_AT_ONCE = 1 << 15
_MULTIPLIERS = np.array(  # odd, of random bits
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


def minhash(token_ids: np.ndarray) -> bytes:
    """Sign the set of a text's 5-grams of tokens: 256 bytes, the same on every machine.

    A text of fewer than five tokens is one gram.
    """
    return _signatures([token_ids])[0].tobytes()


def minhashes(groups: Sequence[TokenGroup]) -> list[bytes]:
    """Sign each group's prompt and completions, as one text in which a completion's tokens know its rank (or label).

    So a preference and its opposite are as similar as their prompts make them, and so are two groups that differ in what
    they reject.
    """
    texts = [
        np.concatenate([g.prompt_ids, *map(_ranked, g.completion_ids, _ranks(g))]).astype(np.int64) for g in groups
    ]
    blocks = [_signatures(texts[i : i + _ROWS_AT_ONCE]) for i in range(0, len(texts), _ROWS_AT_ONCE)]
    return [signature.tobytes() for block in blocks for signature in block]


def _ranks(group: TokenGroup) -> list[int]:
    """Number the completions from the best; a single one by its label: 0 good, 1 bad."""
    return [int(group.scores[0] < 0.5)] if len(group.completion_ids) == 1 else list(range(len(group.completion_ids)))


def _ranked(token_ids: np.ndarray, rank: int) -> np.ndarray:
    return np.asarray(token_ids, np.int64) + (rank << 32)  # beyond every vocabulary


def _signatures(texts: Sequence[np.ndarray]) -> np.ndarray:
    """[n, PERMUTATIONS] of SIGNATURE_DTYPE.

    "Fast Similarity Sketching" (Dahlgaard, Knudsen, Thorup; arXiv 1704.04370): two signatures agree in as large a share
    of their places as the sets are similar, with a standard error of at most sqrt(J * (1 - J) / PERMUTATIONS).
    """
    grams, offsets = _gram_hashes(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets, num_perm=PERMUTATIONS, seed=SEED)
    minima = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), PERMUTATIONS)
    return (minima & 0xFFFF).astype(SIGNATURE_DTYPE)


def _gram_hashes(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Hash the texts' grams, uint64 [grams]; those of text i are at offsets[i]:offsets[i + 1]."""
    lengths = np.array([max(len(text), GRAM_TOKENS) for text in texts])
    ends = np.cumsum(lengths)
    tokens = np.zeros(ends[-1] + GRAM_TOKENS - 1, np.uint64)
    for end, length, text in zip(ends, lengths, texts, strict=True):
        start = end - length
        tokens[start : start + len(text)] = text
        tokens[start : start + len(text)] += np.uint64(1)  # 0 is where a short text has no token
    hashes = tokens[: ends[-1]] * _MULTIPLIERS[0]
    for k in range(1, GRAM_TOKENS):
        hashes += tokens[k : ends[-1] + k] * _MULTIPLIERS[k]
    hashes ^= hashes >> np.uint64(32)  # a sum of products has good upper bits alone: mix them down
    hashes *= _MULTIPLIERS[0]
    hashes ^= hashes >> np.uint64(29)
    within = np.ones(len(hashes), bool)
    within[(ends[:, None] - np.arange(1, GRAM_TOKENS)).ravel()] = False  # grams that would reach into the next text
    grams = lengths - GRAM_TOKENS + 1
    return hashes[within], np.concatenate([[0], np.cumsum(grams)]).astype(np.uint64)


def near_duplicates(minhashes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Find the rows to leave out, each similar to an earlier one, so that no two of the rest are similar.

    Two rows are similar where their signatures agree in at least `threshold` of their places. Compared are rows that
    agree in the whole of one of some bands of places (locality-sensitive hashing): the bands find a pair that is just
    as similar as the threshold with a probability of RECALL at least, and more similar ones more surely. Each row that
    goes was similar to an earlier one, which may itself have gone for another that is earlier still.

    Args:
        minhashes: [n, PERMUTATIONS] of SIGNATURE_DTYPE.
        order: [m] the rows to compare; of similar ones the first stays.
        threshold: Jaccard similarity, above 0 and at most 1.

    Returns:
        [k] the rows among `order` that go.
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
    """Choose how many places a band has: as many as still find RECALL of the pairs that are as similar as `threshold`."""
    for width in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL:
            return width
    return 1


def _similar_within_band(minhashes: np.ndarray, rows: np.ndarray, band: slice, enough: int) -> np.ndarray:
    """Bool [rows]: which go, as rows that agree in the band with an earlier one and are similar to it.

    In every bucket of rows that agree, all at once: those similar to the bucket's first row go; then those similar to
    the first of what is left; and so on.
    """
    _, bucket, sizes = np.unique(_band_keys(minhashes, band)[rows], return_inverse=True, return_counts=True)
    places = np.flatnonzero(sizes[bucket] > 1)
    places = places[np.argsort(bucket[places], kind="stable")]  # by bucket, and there in the order of the rows
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
    """Hash the band's places of each row, uint64 [n]; that two bands may hash alike costs a comparison, no more."""
    multipliers = np.random.default_rng(SEED).integers(2**63, size=band.stop - band.start, dtype=np.uint64) * 2 + 1
    keys = np.empty(len(minhashes), np.uint64)
    for start in range(0, len(minhashes), _SIGNATURES_AT_ONCE):
        block = slice(start, start + _SIGNATURES_AT_ONCE)
        keys[block] = minhashes[block, band].astype(np.uint64) @ multipliers
    return keys


def _agreements(minhashes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Count the places in which row a[i] agrees with row b[i], in blocks of bounded memory."""
    counts = np.empty(len(a), np.int16)
    for start in range(0, len(a), _SIGNATURES_AT_ONCE):
        block = slice(start, start + _SIGNATURES_AT_ONCE)
        counts[block] = np.count_nonzero(minhashes[a[block]] == minhashes[b[block]], axis=1)
    return counts
