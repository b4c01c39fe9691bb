"""Dealing a step's groups to ranks and micro-batches, and what a packed row looks like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_ray.data.groups import Group
from dpo_ray.schedule.build import Packing, pack_step, pair_weight
from dpo_ray.schedule.files import filler
from dpo_ray.schedule.micro_batch import MicroBatch, pack
from dpo_ray.schedule.order import ATTENTION_SCALE, deal, estimate_work
from tests.helpers.schedules import make_group

token_counts = st.lists(st.integers(1, 100), min_size=1, max_size=40)
batches = st.lists(st.integers(0, 10_000), min_size=1, max_size=12, unique=True)


@given(token_counts, st.integers(1, 9), st.integers(1, 150))
def test_every_group_once_equal_counts_budget_kept(tokens, ranks, budget) -> None:
    dealt = deal(tokens, [float(t) ** 1.5 for t in tokens], ranks, budget)
    assert len(dealt) == ranks
    assert len({len(batches) for batches in dealt}) == 1
    flat = [i for batches in dealt for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(tokens)))
    for batches_of_rank in dealt:
        for batch in batches_of_rank:
            assert batch == sorted(batch)
            assert len(batch) <= 1 or sum(tokens[i] for i in batch) <= budget
    assert any(all(batch for batch in batches_of_rank) for batches_of_rank in dealt)  # no count of fillers alone


@given(token_counts, st.integers(1, 9), st.integers(1, 150))
def test_dealing_is_a_function(tokens, ranks, budget) -> None:
    work = [float(t) for t in tokens]
    assert deal(tokens, work, ranks, budget) == deal(list(tokens), list(work), ranks, budget)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=40), st.integers(1, 9))
@example([(100, 50)] + [(1, 49)] * 5, 2)  # dealt by tokens, one rank would get all but the first
def test_no_rank_has_more_than_its_share_of_work_and_one_group(groups, ranks) -> None:
    """The bound of longest-first dealing: the mean plus the largest single piece; tokens have no part in it."""
    tokens, work = zip(*groups, strict=True)
    dealt = deal(tokens, [float(w) for w in work], ranks, 10**9)
    loads = [sum(work[i] for batch in batches for i in batch) for batches in dealt]
    assert max(loads) <= sum(work) / ranks + max(work)


@pytest.mark.parametrize(
    ("tokens", "work", "ranks", "dealt"),
    [
        ([1, 1, 1, 1, 4], [1.0, 1.0, 1.0, 1.0, 4.0], 2, [[[4]], [[0, 1, 2, 3]]]),  # the one of most work comes first
        ([3, 3, 3], [1.0, 1.0, 1.0], 2, [[[0, 2]], [[1]]]),  # of equal work, the first comes first
        ([6, 4], [2.0, 1.0], 1, [[[0, 1]]]),  # exactly full
        ([6, 5], [2.0, 1.0], 1, [[[0], [1]]]),
        ([6, 5, 4], [3.0, 2.0, 1.0], 1, [[[0, 2], [1]]]),  # the last one fits into the first
        ([11, 2], [2.0, 1.0], 1, [[[0], [1]]]),  # over the budget: alone
        ([6, 5, 1], [3.0, 2.0, 2.0], 2, [[[0]], [[1, 2]]]),
        ([9, 9, 9], [3.0, 2.0, 2.0], 2, [[[0], []], [[1], [2]]]),  # as many micro-batches on each rank
    ],
)
def test_dealing_by_hand(tokens: list[int], work: list[float], ranks: int, dealt: list[list[list[int]]]) -> None:
    """A budget of 10 tokens."""
    assert deal(tokens, work, ranks, 10) == dealt


def test_work_counts_visible_pairs() -> None:
    # prompt 2 (3 pairs), completions 1 (2 + 1 pairs) and 3 (6 + 6 pairs)
    assert estimate_work(2, [1, 3]) == pytest.approx(6 + (3 + 3 + 12) / ATTENTION_SCALE)


@given(batches, st.integers(20, 200))
def test_the_step_is_the_same_whatever_the_world(numbers, budget) -> None:
    groups = [make_group(n) for n in numbers]
    by_world = {}
    for ranks in (1, 2, 3, 4):
        weight, tokens, shares = pack_step(groups, Packing(ranks, budget))
        ids = sorted(i for share in shares for m in share if m.weight.any() for i in m.group_ids)
        pairs = sum(pair_weight(g) for g in groups)
        assert weight == pairs
        assert len({len(share) for share in shares}) == 1
        by_world[ranks] = (weight, tokens, ids)
    assert by_world[1] == by_world[2] == by_world[3] == by_world[4]
    assert by_world[1][1] == sum(g.tokens for g in groups)
    assert by_world[1][2] == sorted(g.group_id for g in groups)


def test_weight_of_pairs() -> None:
    ids = tuple(np.array([1], np.int32) for _ in range(4))
    ranked = Group(b"", ids[0], ids, np.array([2, 1, 1, 0], np.float32), weight=0.5)
    assert pair_weight(ranked) == 0  # scores alone make no pairs
    assert pair_weight(replace(ranked, chosen=np.array([0, 1, 0]), rejected=np.array([1, 3, 3]))) == 0.5 * 3
    assert pair_weight(Group(b"", ids[0], ids[:1], np.ones(1, np.float32))) == 0


def check_layout(batch: MicroBatch, groups: list[Group]) -> None:
    """Check a packed row token by token against the layout of the contract."""
    q, references, completion, pairs = 0, [], 0, []
    for g, group in enumerate(groups):
        pairs += [(completion + i, completion + j) for i, j in zip(group.chosen, group.rejected, strict=True)]
        for k, segment in enumerate((group.prompt_ids, *group.completion_ids)):
            for offset, token in enumerate(segment):
                assert batch.input_ids[q] == token
                assert batch.group_index[q] == g
                assert batch.completion_index[q] == k
                assert batch.position_ids[q] == (offset if k == 0 else len(group.prompt_ids) + offset)
                q += 1
            if k:
                assert batch.scores[completion] == group.scores[k - 1]
                known = group.reference_token_logps
                references += list(known[k - 1]) if known is not None else [0.0] * len(segment)
                completion += 1
    assert q == len(batch.input_ids) == sum(g.tokens for g in groups)
    assert completion == len(batch.scores)
    assert list(zip(batch.chosen, batch.rejected, strict=True)) == pairs
    assert batch.reference_token_logps.tolist() == references
    assert batch.weight.tolist() == [g.weight for g in groups]
    assert batch.preference_probability.tolist() == [g.preference_probability for g in groups]
    assert batch.group_ids == tuple(g.group_id for g in groups)


@given(batches)
def test_layout_of_a_packed_row(numbers) -> None:
    groups = [make_group(n) for n in numbers]
    batch = pack(groups)
    check_layout(batch, groups)
    integers = (batch.input_ids, batch.position_ids, batch.group_index, batch.completion_index)
    integers += (batch.chosen, batch.rejected)
    assert all(a.dtype == np.int32 for a in integers)
    floats = (batch.scores, batch.reference_token_logps, batch.weight, batch.preference_probability)
    assert all(a.dtype == np.float32 for a in floats)


def test_groups_without_a_reference_get_zeros() -> None:
    ids = np.array([1, 2], np.int32)
    check_layout(
        pack([group := Group(b"i" * 16, ids, (ids, ids[:1]), np.array([1, 0], np.float32))]),
        [group],
    )


def test_a_filler_is_one_pair_that_weighs_nothing() -> None:
    ids = np.zeros(1, np.int32)
    best, scores = np.array([0]), np.array([1, 0], np.float32)
    check_layout(filler(), [Group(bytes(16), ids, (ids, ids), scores, best, best + 1, weight=0.0)])
