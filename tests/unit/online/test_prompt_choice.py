"""The prompts of a round: all before any comes again, none that evaluation uses, whatever the order of the files."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import DataError
from dpo_ray.online.prompt_choice import prompts_of_round

ids_strategy = st.lists(st.binary(min_size=4, max_size=4), min_size=1, max_size=30, unique=True)
seeds = st.integers(0, 2**31)


def named(count: int) -> list[bytes]:
    return [b"%d" % n for n in range(count)]


@given(ids_strategy, seeds, st.integers(1, 40), st.integers(1, 12))
def test_all_are_seen_before_any_comes_again(ids, seed, count, rounds) -> None:
    seen: Counter[int] = Counter(dict.fromkeys(range(len(ids)), 0))
    for number in range(1, rounds + 1):
        chosen = prompts_of_round(ids, frozenset(), seed, number, count)
        assert len(chosen) == min(count, len(ids)) == len({*chosen})
        seen.update(chosen)
        assert max(seen.values()) - min(seen.values()) <= 1


@given(ids_strategy, seeds, st.integers(1, 40), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(ids, seed, count, number, random) -> None:
    chosen = [ids[k] for k in prompts_of_round(ids, frozenset(), seed, number, count)]
    shuffled = random.sample(ids, len(ids))
    assert [shuffled[k] for k in prompts_of_round(shuffled, frozenset(), seed, number, count)] == chosen
    twice = [*ids, *shuffled]
    again = prompts_of_round(twice, frozenset(), seed, number, count)
    assert [twice[k] for k in again] == chosen
    assert max(again) < len(ids)  # the first of equal ones


@given(ids_strategy, st.data(), seeds, st.integers(1, 40), st.integers(1, 6))
def test_what_evaluation_uses_is_never_chosen_and_changes_nothing_else(ids, data, seed, count, number) -> None:
    excluded = data.draw(st.sets(st.sampled_from(ids), max_size=len(ids) - 1))
    chosen = [ids[k] for k in prompts_of_round(ids, excluded, seed, number, count)]
    assert not excluded & {*chosen}
    rest = [key for key in ids if key not in excluded]
    assert [rest[k] for k in prompts_of_round(rest, frozenset(), seed, number, count)] == chosen


@given(st.integers(20, 40), seeds)
def test_seeds_and_passes_differ(count, seed) -> None:
    ids = named(count)
    first = prompts_of_round(ids, frozenset(), seed, 1, count)
    assert first != prompts_of_round(ids, frozenset(), seed + 1, 1, count)
    assert first != prompts_of_round(ids, frozenset(), seed, 2, count)


def test_the_choice_is_fair() -> None:
    """Each prompt is as likely to come first: chi-square over 600 seeds, 11 degrees of freedom, p = 1e-6."""
    ids = named(12)
    counts = Counter(prompts_of_round(ids, frozenset(), seed, 1, 3)[0] for seed in range(600))
    assert sum((counts[k] - 50) ** 2 / 50 for k in range(12)) < 48


@pytest.mark.parametrize(
    ("ids", "excluded", "message"),
    [
        ([], set(), "online.prompts: there are no prompts"),
        (
            [b"a", b"b"],
            {b"a", b"b"},
            "online.prompts: there are no prompts to sample: the evaluation uses all 2 of them",
        ),
    ],
)
def test_nothing_left_is_an_error(ids: list, excluded: set, message: str) -> None:
    with pytest.raises(DataError) as error:
        prompts_of_round(ids, excluded, 0, 1, 4)
    assert str(error.value).splitlines()[0] == message
