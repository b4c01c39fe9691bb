"""Which groups a step holds: a function of (group ids, seed, step) and of nothing else."""

from __future__ import annotations

import hashlib
import math
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import DataError
from dpo_ray.schedule.order import count_steps, epoch_order, step_groups
from tests.helpers.schedules import group_id

ids_strategy = st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=60, unique=True)
seeds = st.integers(0, 2**31)


@given(ids_strategy, seeds, st.integers(0, 9), st.randoms(use_true_random=False))
def test_an_epoch_is_a_permutation_that_files_do_not_shape(ids, seed, epoch, random) -> None:
    order = epoch_order(ids, seed, epoch)
    assert sorted(order) == list(range(len(ids)))
    shuffled = random.sample(ids, len(ids))
    assert [shuffled[i] for i in epoch_order(shuffled, seed, epoch)] == [ids[i] for i in order]


@given(st.integers(20, 60), seeds, st.integers(0, 9))
def test_seeds_and_epochs_differ(count, seed, epoch) -> None:
    ids = [group_id(n) for n in range(count)]
    order = epoch_order(ids, seed, epoch)
    assert order != epoch_order(ids, seed + 1, epoch)
    assert order != epoch_order(ids, seed, epoch + 1)
    assert epoch_order(ids, 1, 11) != epoch_order(ids, 11, 1)  # "1/11" is not "11/1"


def test_the_order_is_that_of_keyed_hashes() -> None:
    """Of 16 bytes, under the key SEED/EPOCH: another length is another hash, and a run would continue in another order."""
    ids = [bytes([n]) * 16 for n in range(8)]
    digests = {i: hashlib.blake2b(i, digest_size=16, key=b"7/3").hexdigest() for i in ids}
    assert [ids[n] for n in epoch_order(ids, 7, 3)] == sorted(ids, key=digests.__getitem__)


def test_the_permutation_is_fair() -> None:
    """Every place is as likely for every group: chi-square over 400 seeds, 11 degrees of freedom, p = 1e-6."""
    ids, trials = [group_id(n) for n in range(12)], 400
    counts = [0] * 12
    for seed in range(trials):
        counts[epoch_order(ids, seed, 0).index(5)] += 1
    expected = trials / 12
    assert sum((c - expected) ** 2 / expected for c in counts) < 48


@given(ids_strategy, seeds, st.integers(1, 20), st.integers(1, 4))
def test_steps_cover_each_epoch_exactly_once(ids, seed, groups_per_step, epochs) -> None:
    steps = list(step_groups(ids, seed, groups_per_step, epochs, None))
    assert len(steps) == count_steps(len(ids), groups_per_step, epochs, None)
    assert all(len(step) == groups_per_step for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= groups_per_step
    laid_out = [i for step in steps for i in step]
    assert laid_out == [i for epoch in range(epochs) for i in epoch_order(ids, seed, epoch)]


@given(ids_strategy, seeds, st.integers(1, 20), st.integers(1, 30), st.randoms(use_true_random=False))
def test_a_step_depends_on_ids_seed_and_step_alone(ids, seed, groups_per_step, wanted, random) -> None:
    def batches(ids, epochs, steps):
        return [[ids[i] for i in step] for step in step_groups(ids, seed, groups_per_step, epochs, steps)]

    longer = batches(ids, 1, wanted + 5)
    assert batches(ids, 1, wanted) == longer[:wanted]
    assert batches(random.sample(ids, len(ids)), 3, wanted) == longer[:wanted]  # neither file order nor `epochs`
    by_epochs = batches(ids, 2, None)
    whole = 2 * len(ids) // groups_per_step  # steps that are full
    assert by_epochs[:whole][:wanted] == longer[:whole][:wanted]


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 4))
def test_count_of_steps(groups, groups_per_step, epochs) -> None:
    assert count_steps(groups, groups_per_step, epochs, None) == math.ceil(groups * epochs / groups_per_step)
    assert count_steps(groups, groups_per_step, epochs, 7) == 7


def test_steps_without_groups_are_refused_instead_of_sought_forever() -> None:
    with pytest.raises(DataError, match="no groups"):
        next(step_groups([], 0, 4, 1, 3))
    assert list(islice(step_groups([], 0, 4, 1, None), 1)) == []
