"""Signatures against exact Jaccard similarity of sets, and the search against comparing all pairs."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.data import near_duplicates as near
from dpo_ray.data.groups import TokenGroup
from dpo_ray.data.near_duplicates import PERMUTATIONS, band_width, minhash, minhashes, near_duplicates

VOCABULARY = 32_000


def grams(token_ids: np.ndarray) -> set[tuple[int, ...]]:
    tokens = token_ids.tolist()
    return {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def estimate(a: bytes, b: bytes) -> float:
    return float(np.mean(np.frombuffer(a, "<u2") == np.frombuffer(b, "<u2")))


def text(rng: np.random.Generator, tokens: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY, tokens)


def edited(rng: np.random.Generator, token_ids: np.ndarray, edits: int) -> np.ndarray:
    """Replace as many tokens, each of which changes five grams."""
    copy = token_ids.copy()
    copy[rng.choice(len(copy), edits, replace=False)] = rng.integers(VOCABULARY, 2 * VOCABULARY, edits)
    return copy


def group(prompt: np.ndarray, *completions: np.ndarray) -> TokenGroup:
    return TokenGroup(
        prompt_ids=prompt.tolist(),
        completion_ids=[completion.tolist() for completion in completions],
        scores=[1.0] + [0.0] * (len(completions) - 1),
        chosen=[0],
        rejected=[1],
        preference_probability=1.0,
        prompt_hash=b"\0" * 16,
    )


def duplicates_of(signatures: list[bytes], threshold: float) -> set[int]:
    matrix = np.frombuffer(b"".join(signatures), "<u2").reshape(-1, PERMUTATIONS)
    return set(near_duplicates(matrix, np.arange(len(matrix)), threshold).tolist())


@pytest.mark.parametrize(("tokens", "edits"), [(30, 1), (30, 3), (400, 4), (400, 9), (400, 40), (3000, 150)])
def test_signatures_estimate_the_jaccard_similarity_of_grams(tokens, edits):
    rng = np.random.default_rng(tokens + edits)
    texts = [text(rng, tokens) for _ in range(200)]
    copies = [edited(rng, t, edits) for t in texts]
    exact = np.array([jaccard(a, b) for a, b in zip(texts, copies, strict=True)])
    estimated = np.array([estimate(minhash(a), minhash(b)) for a, b in zip(texts, copies, strict=True)])
    standard_error = np.sqrt(exact * (1 - exact) / PERMUTATIONS)
    assert abs(np.mean(estimated - exact)) < 3.5 * np.mean(standard_error) / np.sqrt(len(texts))
    assert np.all(np.abs(estimated - exact) < 4.5 * standard_error)


def test_texts_as_similar_as_0_9_are_found_at_0_8_and_such_of_0_5_are_not():
    """The estimate's standard error is 0.035 at 0.8: 0.9 and 0.5 are three and more of them away."""
    rng = np.random.default_rng(0)
    texts = [text(rng, 400) for _ in range(300)]
    similar = [edited(rng, t, 4) for t in texts[:100]]
    half_similar = [edited(rng, t, 28) for t in texts[100:200]]
    assert all(0.89 < jaccard(a, b) < 0.96 for a, b in zip(texts[:100], similar, strict=True))
    assert all(0.45 < jaccard(a, b) < 0.65 for a, b in zip(texts[100:200], half_similar, strict=True))
    signatures = [minhash(t) for t in [*texts, *similar, *half_similar]]
    assert duplicates_of(signatures, 0.8) == set(range(300, 400))


def test_short_texts_are_one_gram_and_order_counts():
    a, b = np.array([1, 2, 3]), np.array([1, 2, 3, 0])
    assert minhash(a) == minhash(a.copy())
    assert estimate(minhash(a), minhash(b)) < 0.05
    assert estimate(minhash(a), minhash(a[::-1])) < 0.05
    assert estimate(minhash(np.array([0])), minhash(np.array([0, 0]))) < 0.05
    assert len(minhash(np.array([], np.int64))) == len(minhash(a)) == 2 * PERMUTATIONS


def test_a_batch_is_signed_as_each_group_alone():
    rng = np.random.default_rng(1)
    groups = [group(text(rng, n % 9), text(rng, 1 + n % 4), text(rng, 7)) for n in range(300)]
    ranked = [
        np.array([*g.prompt_ids, *g.completion_ids[0], *(i + (1 << 32) for i in g.completion_ids[1])]) for g in groups
    ]
    assert minhashes(groups) == [minhash(ids) for ids in ranked]
    assert minhashes([]) == []


def test_opposite_pairs_and_other_answers_are_near_duplicates_only_where_the_prompt_is_most_of_them():
    rng = np.random.default_rng(2)
    for prompt_tokens, answer_tokens, alike in ((100, 100, False), (1000, 10, True)):
        prompt, chosen, rejected, other = (text(rng, n) for n in (prompt_tokens, *[answer_tokens] * 3))
        pair, opposite = group(prompt, chosen, rejected), group(prompt, rejected, chosen)
        other_chosen = group(prompt, other, rejected)
        assert duplicates_of(minhashes([pair, opposite, other_chosen]), 0.8) == ({1, 2} if alike else set())
    prompt, chosen, rejected, other = (text(rng, 100) for _ in range(4))
    only_rejected_differs = [group(prompt, chosen, rejected), group(prompt, chosen, other)]
    assert duplicates_of(minhashes(only_rejected_differs), 0.8) == set()
    assert duplicates_of(minhashes([group(prompt, chosen, rejected)] * 2), 1.0) == {1}


def test_signatures_are_the_same_in_every_process_and_on_every_processor():
    """The digest was taken with rensa 0.5.0: another would mean that stored signatures cannot be compared any more."""
    program = (
        "import hashlib, numpy as np; from dpo_ray.data.near_duplicates import minhash;"
        "texts = [np.arange(n) * 7919 % 32000 for n in (3, 40, 400, 4000)];"
        "print(hashlib.sha256(b''.join(map(minhash, texts))).hexdigest())"
    )
    for forced in ({}, {"RENSA_FORCE_KERNEL": "scalar", "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **forced}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == GOLDEN


GOLDEN = "e30e7c0846424a230b45cd471f1b3cdc9a9f22cde56a22e4910db2307a7e4342"


@st.composite
def signature_sets(draw) -> np.ndarray:
    """Rows in families: copies of a few bases with some places changed, so that chains of similar rows come about."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    family = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=25))
    bases = rng.integers(0, 2**16, (3, PERMUTATIONS), dtype=np.uint16)
    rows = bases[[base for base, _ in family]] if family else np.empty((0, PERMUTATIONS), np.uint16)
    for row, (_, changes) in zip(rows, family, strict=True):
        row[rng.choice(PERMUTATIONS, changes, replace=False)] = rng.integers(0, 2**16, changes)
    return rows


@given(signature_sets(), st.sampled_from([0.5, 0.7, 0.8, 0.9, 1.0]), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_who_goes_is_like_an_earlier_row_and_those_who_stay_are_unlike(signatures, threshold, random):
    order = np.array(random.sample(range(len(signatures)), len(signatures) * 3 // 4), np.int64)
    gone = near_duplicates(signatures, order, threshold)
    agreement = (signatures[:, None] == signatures[None]).mean(axis=2)
    place = {int(row): i for i, row in enumerate(order)}
    assert set(gone.tolist()) <= place.keys()
    for row in gone.tolist():
        assert any(agreement[row, other] >= threshold for other in order[: place[row]])
    width = band_width(threshold)
    staying = [row for row in order.tolist() if row not in gone]
    for i, a in enumerate(staying):
        for b in staying[:i]:
            same = signatures[a] == signatures[b]
            share_a_band = any(same[k : k + width].all() for k in range(0, PERMUTATIONS - width + 1, width))
            assert agreement[a, b] < threshold or not share_a_band


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_nearly_all_pairs_at_the_threshold_and_the_next_width_would_not(threshold):
    def found(width: int) -> float:
        return 1 - (1 - threshold**width) ** (PERMUTATIONS // width)

    width = band_width(threshold)
    assert found(width) >= 0.98
    assert width == PERMUTATIONS or found(width + 1) < 0.98


def test_a_bucket_of_many_unlike_rows_is_searched_up_to_a_bound(monkeypatch):
    """All 20 rows agree in the first band alone, and 18 is a copy of 3: beyond two leaders it is not looked for there."""
    rng = np.random.default_rng(3)
    signatures = rng.integers(0, 2**16, (20, PERMUTATIONS), dtype=np.uint16)
    signatures[:, : band_width(0.8)] = 7
    signatures[18] = signatures[3]
    assert near_duplicates(signatures, np.arange(20), 0.8).tolist() == [18]
    monkeypatch.setattr(near, "MAX_LEADERS", 2)
    first_band = slice(0, band_width(0.8))
    assert not near._similar_within_band(signatures, np.arange(20), first_band, 103).any()
    assert near_duplicates(signatures, np.arange(20), 0.8).tolist() == [18]  # other bands hold the two alone
