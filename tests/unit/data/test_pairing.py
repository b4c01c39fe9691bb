"""From scores and verdicts to pairs: which, in which order, how probable, and what is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config.data import PairingConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup
from dpo_ray.data.pairing import paired


def scored(*scores: float) -> TextGroup:
    return TextGroup("p", tuple("abcdefgh"[: len(scores)]), scores, chosen=(), rejected=())


def judged(*verdicts: int) -> TextGroup:
    return TextGroup("p", ("a", "b"), (), chosen=(), rejected=(), verdicts=verdicts)


def pairs(group: TextGroup) -> list[str]:
    at = group.completions
    return [f"{at[i]}>{at[j]}" for i, j in zip(group.chosen, group.rejected, strict=True)]


def reason(group: TextGroup, **config) -> str:
    with pytest.raises(Rejected) as caught:
        paired(group, PairingConfig(**config))
    return caught.value.reason


def outcome(group: TextGroup, config: PairingConfig) -> TextGroup | str:
    try:
        return paired(group, config)
    except Rejected as rejected:
        return rejected.reason


@pytest.mark.parametrize(
    ("config", "scores", "expected", "kept"),
    [
        ({}, (2, 9, 5), ["b>a"], [9, 2]),
        ({"pairs": "all"}, (2, 9, 5), ["b>c", "b>a", "c>a"], [9, 5, 2]),
        ({"pairs": "adjacent"}, (2, 9, 5), ["b>c", "c>a"], [9, 5, 2]),
        ({"pairs": "list"}, (2, 9, 5), [], [9, 5, 2]),
        ({"pairs": "all", "min_margin": 4}, (2, 9, 5), ["b>c", "b>a"], [9, 5, 2]),
        ({"pairs": "all", "min_margin": 5}, (2, 9, 5), ["b>a"], [9, 2]),  # c stands in no pair
        ({"pairs": "adjacent", "min_margin": 4}, (2, 9, 5), ["b>c"], [9, 5]),
        ({"pairs": "all"}, (5, 5, 2), ["a>c", "b>c"], [5, 5, 2]),  # equal ones make no pair
        ({}, (5, 5, 2, 2), ["a>d"], [5, 2]),
        ({"pairs": "list"}, (1, 3, 3), [], [3, 3, 1]),
    ],
)
def test_pairs_of_scores(config: dict, scores: tuple, expected: list[str], kept: list):
    group = paired(scored(*scores), PairingConfig(**config))
    assert pairs(group) == expected
    assert list(group.scores) == kept
    assert group.preference_probability == 1.0


@pytest.mark.parametrize("how", ["best_worst", "all", "adjacent", "list"])
def test_equal_scores_are_a_tie(how: str):
    assert reason(scored(3, 3), pairs=how) == "TIE"
    assert reason(scored(3, 3, 3), pairs=how) == "TIE"
    kept = paired(scored(3, 3), PairingConfig(pairs=how, ties="keep"))
    assert (pairs(kept), kept.preference_probability) == (["a>b"], 0.5)


def test_ties_of_longer_lists_are_kept_where_they_become_one_pair():
    kept = paired(scored(3, 3, 3), PairingConfig(ties="keep"))
    assert (kept.completions, kept.preference_probability) == (("a", "c"), 0.5)
    assert reason(scored(3, 3, 3), pairs="all", ties="keep") == "TIE"


@pytest.mark.parametrize("how", ["best_worst", "all", "adjacent", "list"])
def test_low_margin(how: str):
    assert reason(scored(1, 2, 2.5), pairs=how, min_margin=2) == "LOW_MARGIN"
    assert paired(scored(1, 3), PairingConfig(pairs=how, min_margin=2)).scores == (3, 1)


def test_neighbours_may_differ_too_little_though_the_ends_do_not():
    assert reason(scored(1, 2, 3), pairs="adjacent", min_margin=2) == "LOW_MARGIN"


@pytest.mark.parametrize(
    ("verdicts", "probability", "majority", "unanimous"),
    [
        ((1, 1, 1), ("a", 1.0), "a", "a"),
        ((2, 2, 2), ("b", 1.0), "b", "b"),
        ((1, 1, 2), ("a", 2 / 3), "a", "DISAGREEMENT"),
        ((2, 1, 2), ("b", 2 / 3), "b", "DISAGREEMENT"),
        ((1, 1, 0), ("a", 5 / 6), "a", "DISAGREEMENT"),
        ((0, 0, 2), ("b", 2 / 3), "TIE", "DISAGREEMENT"),
        ((0, 1, 2), "TIE", "TIE", "DISAGREEMENT"),
        ((0, 0, 0), "TIE", "TIE", "TIE"),
        ((1, 2), "TIE", "TIE", "DISAGREEMENT"),
        ((1,), ("a", 1.0), "a", "a"),
    ],
)
def test_verdicts(verdicts: tuple[int, ...], probability, majority: str, unanimous: str):
    for annotators, expected in (("probability", probability), ("majority", majority), ("unanimous", unanimous)):
        if expected in ("TIE", "DISAGREEMENT"):
            assert reason(judged(*verdicts), annotators=annotators) == expected
            continue
        winner, p = expected if isinstance(expected, tuple) else (expected, 1.0)
        group = paired(judged(*verdicts), PairingConfig(annotators=annotators))
        assert group.completions[0] == winner
        assert group.preference_probability == pytest.approx(p)
        assert (group.chosen, group.rejected, group.scores) == ((0,), (1,), (1.0, 0.0))


def test_tied_verdicts_are_kept_at_one_half():
    group = paired(judged(0, 1, 2), PairingConfig(ties="keep"))
    assert (group.completions, group.scores, group.preference_probability) == (("a", "b"), (0.5, 0.5), 0.5)
    assert reason(judged(0, 1, 2), ties="keep", annotators="unanimous") == "DISAGREEMENT"


@pytest.mark.parametrize(
    "group",
    [TextGroup("p", ("a", "b"), (1.0, 0.0)), TextGroup("p", ("a",), (0.0,), chosen=(), rejected=())],
    ids=["pair", "unpaired"],
)
def test_plain_data_is_as_it_was(group: TextGroup):
    assert paired(group, PairingConfig(min_margin=3, pairs="all")) is group


CONFIGS = st.builds(
    PairingConfig,
    pairs=st.sampled_from(["best_worst", "all", "adjacent", "list"]),
    min_margin=st.sampled_from([0.0, 1.0, 2.5]),
    ties=st.sampled_from(["drop", "keep"]),
    annotators=st.sampled_from(["probability", "majority", "unanimous"]),
)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=8), CONFIGS)
def test_every_pair_of_scores_is_sound(scores: list[int], config: PairingConfig):
    """Best first; each pair by the margin, or a tie that was to be kept; each completion in a pair, with its own score."""
    before = scored(*map(float, scores))
    own = dict(zip(before.completions, before.scores, strict=True))
    group = outcome(before, config)
    if isinstance(group, str):
        assert group == ("TIE" if len(set(scores)) == 1 else "LOW_MARGIN")
        return
    assert [own[c] for c in group.completions] == list(group.scores) == sorted(group.scores, reverse=True)
    for i, j in zip(group.chosen, group.rejected, strict=True):
        margin = group.scores[i] - group.scores[j]
        assert (margin > 0 and margin >= config.min_margin) == (group.preference_probability == 1.0)
        assert margin > 0 or config.ties == "keep"
    if group.chosen:
        assert {*group.chosen, *group.rejected} == set(range(len(group.completions)))
    else:
        assert (config.pairs, len(group.completions)) == ("list", len(scores))


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=9), CONFIGS)
def test_naming_the_completions_the_other_way_round_changes_nothing(verdicts: list[int], config: PairingConfig):
    one = outcome(judged(*verdicts), config)
    swapped = judged(*({0: 0, 1: 2, 2: 1}[v] for v in verdicts))
    other = outcome(TextGroup("p", ("b", "a"), (), chosen=(), rejected=(), verdicts=swapped.verdicts), config)
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
    elif one.preference_probability == 0.5:
        assert other.preference_probability == 0.5
    else:
        assert one == other
        assert one.preference_probability > 0.5
