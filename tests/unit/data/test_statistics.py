"""Statistics of groups: against plain Python on the same rows, and the same however the parts are added up."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.schemas import TOKENS
from dpo_ray.data.statistics import bin_edges, measure, merged, quantile, summary


def row(
    prompt: int,
    completions: list[int],
    pairs: list[tuple[int, int]] = ((0, 1),),  # type: ignore[assignment]
    probability: float = 1.0,
    scores: list[float] | None = None,
) -> dict:
    return {
        "group_id": bytes(16),
        "source": "s",
        "prompt_ids": [1] * prompt,
        "completion_ids": [[2] * n for n in completions],
        "scores": scores or [float(len(completions) - i) for i in range(len(completions))],
        "chosen": [c for c, _ in pairs],
        "rejected": [r for _, r in pairs],
        "preference_probability": probability,
        "weight": 1.0,
    }


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TOKENS)


@st.composite
def any_row(draw: st.DrawFn) -> dict:
    lengths = st.integers(1, 200)
    completions = draw(st.lists(lengths, min_size=1, max_size=4))
    every = [(i, j) for i in range(len(completions)) for j in range(i + 1, len(completions))]
    pairs = draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    probability = draw(st.sampled_from([0.5, 2 / 3, 5 / 6, 1.0])) if pairs else 1.0
    scores = [draw(st.sampled_from([0.0, 1.0]))] if len(completions) == 1 else None
    return row(draw(lengths), completions, pairs, probability, scores)


rows_of_data = st.lists(any_row(), max_size=12)


@given(rows_of_data)
def test_sums_are_those_of_a_plain_loop_over_the_rows(rows: list[dict]) -> None:
    found = measure(table(rows))
    pairs = [
        (len(r["completion_ids"][c]), len(r["completion_ids"][j]), len(r["prompt_ids"]), r["preference_probability"])
        for r in rows
        for c, j in zip(r["chosen"], r["rejected"], strict=True)
    ]
    assert found["groups"] == len(rows)
    assert found["completions"] == sum(len(r["completion_ids"]) for r in rows)
    assert found["pairs"] == len(pairs)
    assert found["unpaired"] + found["lists"] == sum(not r["chosen"] for r in rows)
    assert found["desirable"] == sum(len(r["completion_ids"]) == 1 and r["scores"] == [1.0] for r in rows)
    assert found["chosen"]["sum"] == sum(c for c, _, _, _ in pairs)
    assert found["rejected"]["sum"] == sum(r for _, r, _, _ in pairs)
    assert found["chosen_longer_by"]["count"] == sum(c > r for c, r, _, _ in pairs)
    assert found["tokens_shared"] == sum(len(r["prompt_ids"]) + sum(map(len, r["completion_ids"])) for r in rows)
    assert found["tokens_unshared"] == sum(len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"])
    alone = [len(r["prompt_ids"]) + len(c) for r in rows if not r["chosen"] for c in r["completion_ids"]]
    assert found["tokens_as_pairs"] == sum(2 * p + c + r for c, r, p, _ in pairs) + sum(alone)
    longest = [len(r["prompt_ids"]) + max(map(len, r["completion_ids"])) for r in rows]
    assert found["whole"]["max"] == max(longest, default=0)
    assert found["whole"]["at_max"] == longest.count(max(longest, default=0))
    assert sum(found["probability_percent"].values()) == sum(bool(r["chosen"]) for r in rows)

    bias = summary(found)["length_bias"]
    over = math.sqrt(sum((2 * p - 1) ** 2 for *_, p in pairs) * sum((c - r) ** 2 for c, r, _, _ in pairs))
    if over:
        expected = sum((2 * p - 1) * (c - r) for c, r, _, p in pairs) / over
        assert bias["correlation"] == pytest.approx(expected, abs=1e-5)
        assert -1.000001 <= bias["correlation"] <= 1.000001


@given(rows_of_data, st.integers(0, 12), st.integers(0, 12))
def test_parts_add_up_to_the_whole_however_they_are_grouped(rows: list[dict], first: int, second: int) -> None:
    cuts = sorted((first, second))
    parts = [measure(table(rows[a:b])) for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    through_json = [json.loads(json.dumps(part)) for part in parts]
    whole = merged([measure(table(rows))])
    assert merged(parts) == whole
    assert merged([merged(through_json[:2]), through_json[2]]) == whole
    assert merged([parts[0], merged(parts[1:])]) == whole
    assert merged(reversed(parts)) == whole


def test_rows_in_several_chunks_are_those_of_one() -> None:
    rows = [row(n, [n + 1, 3]) for n in range(1, 40)]
    chunked = pa.concat_tables([table(rows[:7]), table(rows[7:])])
    assert measure(chunked) == measure(table(rows))
    assert measure(table(rows).slice(5, 20)) == measure(table(rows[5:25]))


def test_bins_are_exact_to_64_and_to_a_32nd_above() -> None:
    edges = bin_edges(400)
    assert edges[:65].tolist() == list(range(65))
    assert edges[64:68].tolist() == [64, 66, 68, 70]
    widths = np.diff(edges)
    assert (widths[64:] * 32 <= edges[64:-1]).all()
    values = [0, 1, 63, 64, 65, 66, 127, 128, 131, 1000, 4095, 4096, 100_000]
    counted = measure(table([row(v, [1, 2]) for v in values]))["prompt"]["bins"]
    expected, _ = np.histogram(values, bins=bin_edges(len(counted)))
    assert counted == expected.tolist()


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200), st.sampled_from([0.05, 0.25, 0.5, 0.95, 1.0]))
def test_quantiles_are_those_of_the_lengths_within_a_bin(lengths: list[int], share: float) -> None:
    histogram = measure(table([row(n, [1, 2]) for n in lengths]))["prompt"]
    expected = int(np.quantile(lengths, share, method="inverted_cdf"))
    assert abs(quantile(histogram, share) - expected) <= expected / 32


@pytest.mark.parametrize(
    ("rows", "correlation"),
    [
        ([row(5, [20, 10])] * 9, 1.0),  # always longer, always by the same
        ([row(5, [10, 20])] * 9, -1.0),
        ([row(5, [20, 10]), row(5, [10, 20])], 0.0),
        ([row(5, [20, 10])] * 3 + [row(5, [10, 20])], 0.5),  # (3 - 1) / 4
        ([row(5, [10, 10])] * 4, None),  # lengths say nothing
        ([row(5, [20, 10], probability=0.5)] * 4, None),  # nor do ties
        # by hand: s = 1, 1/3; l = 10, -30; (10 - 10) / ... = 0
        ([row(5, [20, 10]), row(5, [10, 40], probability=2 / 3)], 0.0),
    ],
)
def test_length_bias_of_cases_worked_by_hand(rows: list[dict], correlation: float | None) -> None:
    found = summary(measure(table(rows)))["length_bias"]["correlation"]
    assert found is None if correlation is None else found == pytest.approx(correlation, abs=1e-6)


def test_summary_of_a_small_set() -> None:
    rows = [row(10, [4, 6]), row(10, [4, 6]), row(20, [3, 2, 1], [(0, 1), (0, 2), (1, 2)]), row(7, [5], [], 1.0, [1.0])]
    said = summary(merged([measure(table(rows[:1])), measure(table(rows[1:]))]))
    assert {k: said[k] for k in ("groups", "completions", "pairs", "unpaired", "desirable", "lists")} == {
        "groups": 4,
        "completions": 8,
        "pairs": 5,
        "unpaired": 1,
        "desirable": 1,
        "lists": 0,
    }
    assert said["lengths"]["prompt"] == {
        "count": 4,
        "mean": 11.75,
        "p5": 7,
        "p25": 7,
        "p50": 10,
        "p75": 10,
        "p95": 20,
        "max": 20,
    }
    assert said["tokens"]["shared"] == 2 * (10 + 10) + (20 + 6) + (7 + 5)
    assert said["tokens"]["as_pairs"] == 2 * 30 + (45 + 44 + 43) + 12
    assert said["longest"] == {"tokens": 23, "groups": 1}
    assert said["probabilities"] == {1.0: 3}


def test_sharing_saves_the_second_prompt_of_every_pair() -> None:
    tokens = summary(measure(table([row(80, [10, 10])] * 5)))["tokens"]
    assert tokens == {
        "shared": 500,
        "unshared": 900,
        "as_pairs": 900,
        "padded": pytest.approx(900, rel=1 / 32),  # all of one length: nothing to pad
        "padded_batch_groups": 8,
        "saved_fraction": pytest.approx(4 / 9),
    }


def test_padding_expects_what_random_batches_need() -> None:
    noise = random.Random(4)
    rows = [row(noise.randrange(1, 60), [noise.randrange(1, 60), noise.randrange(1, 60)]) for _ in range(800)]
    whole = [len(r["prompt_ids"]) + max(map(len, r["completion_ids"])) for r in rows]
    needed = []
    for _ in range(40):
        noise.shuffle(whole)
        needed.append(sum(2 * 8 * max(whole[i : i + 8]) for i in range(0, 800, 8)))
    assert summary(measure(table(rows)))["tokens"]["padded"] == pytest.approx(sum(needed) / 40, rel=0.01)


def test_nothing_measured_is_said_as_nothing() -> None:
    said = summary(merged([]))
    assert said["groups"] == 0
    assert said["length_bias"] is None
    assert said["lengths"]["prompt"] is None
    assert said["tokens"]["saved_fraction"] == 0.0
    assert summary(measure(table([row(5, [3], [], 1.0, [0.0])])))["lengths"]["chosen"] is None
