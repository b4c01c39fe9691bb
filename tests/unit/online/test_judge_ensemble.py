"""Ensembles in closed form: ranks, weighted means, and agreement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.judge import EnsembleJudge
from dpo_ray.online.judges.ensemble import combined, concordance, ranks
from dpo_ray.online.judges.make import judge_digest, make_judge
from dpo_ray.online.judges.memory import JournalMemory
from dpo_ray.online.judges.protocol import Question, Verdict

finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 1.0, 2.0], [1.0, 0.0, 0.5]),
        ([5.0, 5.0], [0.5, 0.5]),
        ([1.0, 2.0, 2.0, 3.0, 9.0], [0.0, 0.375, 0.375, 0.75, 1.0]),
        ([None, 7.0, 8.0], [None, 0.0, 1.0]),
        ([None, 7.0], [None, None]),
        ([], []),
    ],
)
def test_ranks(scores: list[float | None], expected: list[float | None]) -> None:
    assert ranks(scores) == expected


@given(st.lists(finite, min_size=2, max_size=8))
def test_ranks_are_those_of_pandas_put_between_0_and_1(scores: list[float]) -> None:
    assert ranks(scores) == pytest.approx(list((pd.Series(scores).rank() - 1) / (len(scores) - 1)))


def bubble_sort_swaps(order: Sequence[int]) -> int:
    """Count the swaps of neighbours that sort a list: the distance of which Kendall's tau is the scaled form."""
    row, swaps = list(order), 0
    for end in range(len(row), 1, -1):
        for i in range(end - 1):
            if row[i] > row[i + 1]:
                row[i], row[i + 1], swaps = row[i + 1], row[i], swaps + 1
    return swaps


@given(st.permutations(range(6)))
def test_concordance_of_two_falls_with_each_swap_of_neighbours(order: list[int]) -> None:
    scores = {"a": [10.0 * i for i in range(6)], "b": [float(i) for i in order]}
    assert concordance(scores, {"a": 1.0, "b": 4.0}) == pytest.approx(1 - bubble_sort_swaps(order) / 15)


def test_concordance_by_weight_with_ties_and_gaps() -> None:
    one = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert concordance({"a": [1.0, 2.0], "b": [1.0, 2.0]}, one) == 1.0
    assert concordance({"a": [1.0, 2.0], "b": [2.0, 1.0]}, one) == 0.0
    assert concordance({"a": [1.0, 2.0], "b": [2.0, 2.0]}, one) == 0.5
    assert concordance({"a": [2.0, 2.0], "b": [3.0, 3.0]}, one) == 1.0
    assert concordance({"a": [1.0, None], "b": [2.0, 1.0]}, one) == 1.0
    scores = {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [2.0, 1.0]}
    # a and b agree with weight 2 * 3; c is against a with 2 * 1 and against b with 3 * 1
    assert concordance(scores, {"a": 2.0, "b": 3.0, "c": 1.0}) == pytest.approx(6 / 11)


def test_the_weighted_mean_of_ranks_and_who_abstains() -> None:
    verdicts = {
        "one": Verdict((0.1, 0.9, 0.5)),
        "two": Verdict((10.0, None, 30.0), reason="too long"),
        "three": Verdict((None, None, None), reason="no reference answer"),
    }
    verdict = combined(verdicts, {"one": 1.0, "two": 3.0, "three": 5.0})
    assert verdict.scores == pytest.approx((0.0, 1.0, (0.5 + 3.0) / 4))
    assert verdict.agreement == 1.0
    assert verdict.members["two"] == (10.0, None, 30.0)
    assert verdict.reason == ""
    silent = combined(
        {"one": Verdict((None, 1.0), reason="slow"), "two": Verdict((None, None))}, {"one": 1.0, "two": 1.0}
    )
    assert silent.scores == (None, None)
    assert silent.reason == "one: slow; two: fewer than two scores"


def lengths(prompts: Sequence[str], completions: Sequence[str]) -> Iterator[float]:
    return (float(len(c)) for c in completions)


def shortness(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [-float(len(c)) for c in completions]


def test_an_ensemble_of_made_judges_remembers_each_member(tmp_path: Path) -> None:
    config = EnsembleJudge.model_validate(
        {
            "members": [
                {"judge": {"type": "function", "function": f"{__name__}.lengths"}, "weight": 3},
                {"judge": {"type": "function", "function": f"{__name__}.shortness"}},
                {"judge": {"type": "verifier", "check": "exact"}},
            ]
        }
    )
    memory = JournalMemory(Storage(tmp_path), judge_digest(config), "one")
    judge = make_judge(config, memory)
    questions = [Question("p", ("a", "bb", "ccc")), Question("q", ("x", "yy"), answer="X")]
    verdicts = dict(judge.judge(questions))
    judge.close()
    assert verdicts[0].scores == (0.25, 0.5, 0.75)
    assert verdicts[1].scores == ((0 * 3 + 1 + 1) / 5, (3 + 0 + 0) / 5)
    assert verdicts[1].members == {"1_function": (1.0, 2.0), "2_function": (-1.0, -2.0), "3_verifier": (1.0, 0.0)}
    assert verdicts[1].agreement == pytest.approx(1 / 7)  # only two agree, whose weights are 1 and 1, of 3 + 3 + 1
    assert len(memory) == 2 * 2  # a verifier that only compares has nothing to remember
