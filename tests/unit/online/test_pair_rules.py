"""From a prompt's judged completions to pairs: every mode by hand, and what holds for all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from dpo_ray.config.online import RoundPairingConfig
from dpo_ray.online.pair_rules import REASONS, Paired, adjusted_scores, pairs_of


def paired(scores, config: dict | RoundPairingConfig, *, lengths=None, truncated=None, keys=None, **rest) -> Paired:
    count = len(scores)
    return pairs_of(
        scores,
        lengths or [10] * count,
        truncated or [False] * count,
        keys or [bytes([i]) for i in range(count)],
        rest.get("agreement", 1.0),
        config if isinstance(config, RoundPairingConfig) else RoundPairingConfig(**config),
        rest.get("pair_truncated", False),
        rest.get("seed", 0),
    )


@pytest.mark.parametrize(
    ("config", "scores", "expected"),
    [
        ({}, [2, 9, 5], [(1, 0)]),
        ({}, [9, 2, 9, 2], [(0, 3)]),  # of equal ones the first is the best, and the last the worst
        ({}, [2, None, 5], [(2, 0)]),
        ({}, [2, math.nan, 5, math.inf], [(2, 0)]),
        ({"pairs": "top_bottom"}, [1, 2, 3, 4], [(3, 1), (3, 0), (2, 1), (2, 0)]),
        ({"pairs": "top_bottom"}, [1, 2, 3], [(2, 0)]),  # the middle one would be on both sides
        ({"pairs": "top_bottom", "k": 1}, [1, 2, 3, 4], [(3, 0)]),
        ({"pairs": "top_bottom", "k": 9}, [1, 2, 3, 4, 5], [(4, 1), (4, 0), (3, 1), (3, 0)]),
        ({"pairs": "top_bottom", "min_margin": 1}, [1, 2, 3, 4], [(3, 1), (3, 0), (2, 0)]),
        ({"pairs": "top_bottom"}, [5, 5, 5, 4], [(0, 3), (1, 3)]),  # ties make no pair
        ({"pairs": "margin"}, [2, 9, 5], [(1, 2), (1, 0), (2, 0)]),
        ({"pairs": "margin", "min_margin": 3.5}, [2, 9, 5], [(1, 2), (1, 0)]),
        ({"pairs": "margin", "min_margin": 4}, [2, 9, 5], [(1, 0)]),  # 4 apart is not further apart than 4
        ({"pairs": "margin"}, [5, 5, 2], [(0, 2), (1, 2)]),
    ],
)
def test_pairs_of_scores(config: dict, scores: list, expected: list) -> None:
    assert paired(scores, config) == Paired(pairs=tuple(expected))


def test_a_list_is_kept_whole_and_best_first() -> None:
    assert paired([2, 9, None, 5, 9], {"pairs": "list"}) == Paired(listed=(1, 4, 3, 0))


@pytest.mark.parametrize(
    ("reason", "scores", "arguments"),
    [
        ("too_few_completions", [3], {}),
        ("too_few_completions", [], {}),
        ("abstained", [3, None, None], {}),
        ("low_agreement", [3, 1], {"agreement": 0.5}),
        ("truncated", [3, 1, 2], {"truncated": [True, False, True]}),
        ("identical", [3, 1, None], {"keys": ["a", "a", "b"]}),
        ("tie", [3, 3, 3], {}),
        ("below_margin", [3, 1, 2], {"config": {"min_margin": 2}}),
        ("length_ratio", [3, 1], {"lengths": [21, 10]}),
    ],
)
@pytest.mark.parametrize("mode", ["best_worst", "best_random", "top_bottom", "margin", "list"])
def test_reasons(mode: str, reason: str, scores: list, arguments: dict) -> None:
    config = {"pairs": mode, "min_agreement": 0.6, "max_length_ratio": 2, **arguments.get("config", {})}
    result = paired(scores, config, **{k: v for k, v in arguments.items() if k != "config"})
    if reason == "length_ratio" and mode == "list":  # a ratio is of a pair
        assert result == Paired(listed=(0, 1))
    else:
        assert result == Paired(dropped=reason)


def test_limits_include_what_they_name() -> None:
    assert paired([3, 1], {"min_agreement": 0.6}, agreement=0.6).pairs == ((0, 1),)
    assert paired([3, 1], {"max_length_ratio": 2}, lengths=[20, 10]).pairs == ((0, 1),)


def test_of_equal_completions_the_first_that_was_judged_stays() -> None:
    assert paired([1, 9, 5], {}, keys=["a", "a", "b"]).pairs == ((2, 0),)
    assert paired([None, 9, 5], {}, keys=["a", "a", "b"]).pairs == ((1, 2),)


def test_length_takes_from_the_score_before_the_ranking() -> None:
    assert paired([5, 6], {}, lengths=[10, 100]).pairs == ((1, 0),)
    assert paired([5, 6], {"length_penalty": 0.02}, lengths=[10, 100]).pairs == ((0, 1),)
    assert paired([5, 5], {"length_penalty": 0.02}, lengths=[100, 10]).pairs == ((1, 0),)
    assert paired([5, 6], {"length_penalty": 0.02, "pairs": "list"}, lengths=[10, 100]).listed == (0, 1)
    adjusted = adjusted_scores([5, None, math.nan, 6], [10, 1, 1, 100], RoundPairingConfig(length_penalty=0.02))
    assert adjusted == [pytest.approx(4.8), None, None, pytest.approx(4.0)]


def test_truncated_completions_are_paired_where_allowed() -> None:
    assert paired([9, 5, 1], {}, truncated=[True, False, False]).pairs == ((1, 2),)
    assert paired([9, 5, 1], {}, truncated=[True, False, False], pair_truncated=True).pairs == ((0, 2),)


def test_the_random_partner_is_of_the_seed_and_every_one_comes() -> None:
    scores = [1, 9, 2, 3, 8.5]
    drawn = [paired(scores, {"pairs": "best_random", "min_margin": 1}, seed=seed).pairs for seed in range(600)]
    assert drawn[7] == paired(scores, {"pairs": "best_random", "min_margin": 1}, seed=7).pairs
    counts = {pair: drawn.count((pair,)) for pair in [(1, 0), (1, 2), (1, 3)]}
    assert sum(counts.values()) == 600  # never (1, 4), which are too close
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 24  # chi-square, 2 degrees of freedom, p = 6e-6


def test_reasons_are_sentences() -> None:
    assert set(REASONS) >= {"tie", "low_agreement", "abstained", "truncated", "identical", "length_ratio"}
    assert all(len(text) > 15 for text in REASONS.values())


configs = st.builds(
    RoundPairingConfig,
    pairs=st.sampled_from(["best_worst", "best_random", "top_bottom", "margin", "list"]),
    k=st.integers(1, 4),
    min_margin=st.sampled_from([0.0, 0.5, 2.0]),
    min_agreement=st.sampled_from([0.0, 0.5]),
    length_penalty=st.sampled_from([0.0, 0.125]),
    max_length_ratio=st.sampled_from([None, 1.5, 3.0]),
)


@st.composite
def prompts(draw, distinct: bool = False):
    count = draw(st.integers(0, 7))
    scores = draw(st.lists(st.none() | st.integers(-4, 4), min_size=count, max_size=count))
    keys = draw(st.lists(st.integers(0, 50 if distinct else 4), min_size=count, max_size=count, unique=distinct))
    return {
        "scores": scores,
        "lengths": draw(st.lists(st.integers(1, 40), min_size=count, max_size=count)),
        "truncated": draw(st.lists(st.booleans(), min_size=count, max_size=count)),
        "completion_keys": keys,
        "agreement": draw(st.sampled_from([0.25, 1.0])),
        "pair_truncated": draw(st.booleans()),
        "seed": draw(st.integers(0, 5)),
    }


@given(prompts(), configs)
def test_what_holds_for_every_prompt(prompt: dict, config: RoundPairingConfig) -> None:
    result = pairs_of(**prompt, config=config)
    assert sum(map(bool, (result.pairs, result.listed, result.dropped))) == 1
    assert result.dropped is None or result.dropped in REASONS
    assert bool(result.listed) == (config.pairs == "list" and result.dropped is None)
    assert len({*result.pairs}) == len(result.pairs)
    scores, lengths, keys = prompt["scores"], prompt["lengths"], prompt["completion_keys"]
    named = [*result.listed, *(i for pair in result.pairs for i in pair)]
    assert all(scores[i] is not None for i in named)
    assert prompt["pair_truncated"] or not any(prompt["truncated"][i] for i in named)
    assert len({keys[i] for i in named}) == len({*named})
    for better, worse in result.pairs:
        value = {i: scores[i] - config.length_penalty * lengths[i] for i in (better, worse)}
        assert value[better] - value[worse] > config.min_margin
        long, short = sorted((lengths[better], lengths[worse]), reverse=True)
        assert config.max_length_ratio is None or long / short <= config.max_length_ratio
    if config.pairs == "top_bottom":
        assert not {i for i, _ in result.pairs} & {j for _, j in result.pairs}


@given(prompts(distinct=True), configs, st.randoms(use_true_random=False))
def test_the_order_of_completions_does_not_matter(prompt: dict, config: RoundPairingConfig, random) -> None:
    prompt["scores"] = [None if s is None else s + i / 64 for i, s in enumerate(prompt["scores"])]
    values = [
        s - config.length_penalty * n for s, n in zip(prompt["scores"], prompt["lengths"], strict=True) if s is not None
    ]
    if len({*values}) < len(values):
        reject()
    order = random.sample(range(len(prompt["scores"])), len(prompt["scores"]))
    columns = ("scores", "lengths", "truncated", "completion_keys")
    shuffled = pairs_of(**{**prompt, **{c: [prompt[c][i] for i in order] for c in columns}}, config=config)
    plain = pairs_of(**prompt, config=config)
    assert tuple((order[i], order[j]) for i, j in shuffled.pairs) == plain.pairs
    assert tuple(order[i] for i in shuffled.listed) == plain.listed
    assert shuffled.dropped == plain.dropped
