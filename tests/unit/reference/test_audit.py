"""The audit's statistics: on arrays whose figures were worked out by hand, and on random ones against plain Python."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import AuditError
from dpo_ray.reference.audit import HISTOGRAM_BINS, MAX_POINTS, measure
from dpo_ray.schedule.audit_pairs import ComparedGroup
from tests.helpers.audited_groups import SAMPLE, group

DRIFT = [0.25, -0.5, 0, 0, 0.25, 0.25, 0.25, -0.125, 0.5, 0, 0, 1.0]
ERRORS, PER_TOKEN, LENGTHS = [-0.25, -0.75, 0.5], [-0.125, -0.25, 0.0], [1, -2, 1]


def test_statistics() -> None:
    m = measure(SAMPLE)
    assert (m["groups"], m["paired_groups"], m["pairs"], m["tokens"]) == (4, 3, 3, 12)
    assert m["mean_token_drift"] == 3.125 / 12
    assert m["max_token_drift"] == 1.0
    assert m["signed_bias"] == 1.875 / 12
    assert m["multiplicative_error"] == pytest.approx(sum(math.exp(abs(d)) for d in DRIFT) / 12)
    assert m["margin_error_nats"] == pytest.approx(statistics.pstdev(ERRORS))
    assert m["margin_error_nats_per_token"] == pytest.approx(statistics.pstdev(PER_TOKEN))
    assert m["length_correlation"] == pytest.approx(statistics.correlation(ERRORS, LENGTHS))
    assert m["pair_errors"] == {"length_difference": LENGTHS, "error_nats": ERRORS}


def test_the_error_of_the_bias_takes_groups_as_independent_and_their_tokens_as_one() -> None:
    """Repeating every token of a group says nothing new; repeating the groups halves the variance."""
    base = [group(i, [[-1.0 + e]], [[-1.0]], ()) for i, e in enumerate((0.5, -0.25, 0.25, 0.0))]
    # The mean is 1/8, the residuals 3/8, -3/8, 1/8 and -1/8: sqrt(4 / 3 * 20 / 64) / 4
    once = math.sqrt(4 / 3 * 20 / 64) / 4
    assert measure(base)["signed_bias_error"] == pytest.approx(once)
    longer = [group(i, [[-1.0 + e] * 5], [[-1.0] * 5], ()) for i, e in enumerate((0.5, -0.25, 0.25, 0.0))]
    assert measure(longer)["signed_bias_error"] == pytest.approx(once)
    more = [group(i, [[-1.0 + e]], [[-1.0]], ()) for i, e in enumerate((0.5, -0.25, 0.25, 0.0) * 16)]
    assert measure(more)["signed_bias_error"] == pytest.approx(math.sqrt(64 / 63 * 16 * 20 / 64) / 64)
    assert measure(base[:1])["signed_bias_error"] is None


def test_the_sign_is_stored_minus_own() -> None:
    turned = [ComparedGroup(g.group_id, g.own, g.stored, g.chosen, g.rejected) for g in SAMPLE]
    assert measure(turned)["signed_bias"] == -measure(SAMPLE)["signed_bias"]


def test_pairs_are_the_groups_own_and_not_its_first_two_completions() -> None:
    d = [[0.0], [0.5], [4.0]]
    stored = [[-5.0 + x for x in c] for c in d]
    one = measure([group(1, stored, [[-5.0]] * 3, ((1, 0),)), group(2, [[-5.0]] * 2, [[-5.0]] * 2)])
    assert one["pair_errors"]["error_nats"] == [0.5, 0.0]
    every = measure([group(1, stored, [[-5.0]] * 3, ((1, 0), (2, 0), (2, 1)))])
    assert every["pair_errors"]["error_nats"] == [0.5, 4.0, 3.5]
    assert (every["pairs"], every["paired_groups"]) == (3, 1)


def test_agreement_has_no_drift() -> None:
    m = measure([ComparedGroup(g.group_id, g.own, g.own, g.chosen, g.rejected) for g in SAMPLE])
    for name in ("max_token_drift", "mean_token_drift", "signed_bias", "signed_bias_error", "margin_error_nats"):
        assert m[name] == 0, name
    assert m["multiplicative_error"] == 1
    assert m["worst_groups"] == []
    assert m["drift_histogram"] == {"range_nats": 0.0, "counts": [], "beyond": 0}


def test_nothing_compared_is_no_drift_either() -> None:
    m = measure([])
    assert (m["groups"], m["pairs"], m["tokens"], m["max_token_drift"], m["length_correlation"]) == (0, 0, 0, 0, 0)


def test_a_group_counts_once_and_the_order_does_not_matter() -> None:
    assert measure([*reversed(SAMPLE), SAMPLE[0], SAMPLE[3]]) == measure(SAMPLE)


def test_the_worst_groups_are_named_worst_first() -> None:
    drifts = {5: 0.25, 6: 0.0, 7: 2.0, 8: 0.5, 9: 1.0}
    sample = [group(n, [[-9.0 + d, -9.0]], [[-9.0, -9.0]], ()) for n, d in drifts.items()]
    worst = measure(sample)["worst_groups"]
    assert [int(g["group_id"], 16) for g in worst] == [7, 9, 8]
    assert worst[0] == {"group_id": f"{7:032x}", "max_token_drift": 2.0, "mean_token_drift": 1.0}
    assert len(measure(sample[:2])["worst_groups"]) == 1  # one that does not drift is not among them


def test_a_few_far_tokens_do_not_flatten_the_histogram() -> None:
    d = np.linspace(-0.01, 0.01, 1001)
    d[500] = 50.0
    histogram = measure([group(1, [(d - 60).tolist()], [[-60.0] * 1001], ())])["drift_histogram"]
    assert histogram["range_nats"] == pytest.approx(0.01, rel=0.02)
    assert len(histogram["counts"]) == HISTOGRAM_BINS
    assert 1 <= histogram["beyond"] <= 7
    assert sum(histogram["counts"]) + histogram["beyond"] == 1001


def test_figures_are_small_and_are_json() -> None:
    sample = [group(i, [[-1.1, -1.0], [-2.3]], [[-1.0, -1.0], [-2.0]]) for i in range(1000)]
    m = measure(sample)
    assert len(m["pair_errors"]["error_nats"]) == MAX_POINTS
    assert len(json.dumps(m, allow_nan=False)) < 4000
    hopeless = measure([group(1, [[-1.0]], [[-3e38]], ())])
    assert json.loads(json.dumps(hopeless, allow_nan=False))["max_token_drift"] == pytest.approx(3e38)


@pytest.mark.parametrize(
    ("stored", "own", "whose"), [(-1.0, math.nan, "trainer"), (math.inf, -1.0, "stored reference")]
)
def test_what_is_not_finite_stops_whatever_the_recipe_says(stored: float, own: float, whose: str) -> None:
    with pytest.raises(AuditError, match=f"{whose} are not finite in group {9:032x}"):
        measure([SAMPLE[0], group(9, [[stored]], [[own]], ())])


def test_completions_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        measure([group(1, [[-1.0]], [[-1.0], [-1.0]], ())])


logps = st.floats(-20, 0, width=32)
completion = st.lists(st.tuples(logps, logps), min_size=1, max_size=5)


@given(st.lists(st.tuples(completion, completion), min_size=2, max_size=8))
def test_random_pairs_against_plain_python(pairs: list[tuple[list, list]]) -> None:
    sample = [
        group(i, [[s for s, _ in c] for c in completions], [[o for _, o in c] for c in completions])
        for i, completions in enumerate(pairs)
    ]
    d = [[[s - o for s, o in c] for c in completions] for completions in pairs]
    flat = [x for g in d for c in g for x in c]
    errors = [sum(chosen) - sum(rejected) for chosen, rejected in d]
    m = measure(sample)
    assert m["tokens"] == len(flat)
    assert m["mean_token_drift"] == pytest.approx(statistics.fmean(map(abs, flat)), abs=1e-9)
    assert m["signed_bias"] == pytest.approx(statistics.fmean(flat), abs=1e-9)
    assert m["max_token_drift"] == pytest.approx(max(map(abs, flat)), abs=1e-9)
    assert m["margin_error_nats"] == pytest.approx(statistics.pstdev(errors), abs=1e-6)
    assert abs(m["signed_bias"]) <= m["mean_token_drift"] <= m["max_token_drift"]
    # What lets the multiplicative error go without a limit: the token limits bound it from both sides.
    mean, most = m["mean_token_drift"], m["max_token_drift"]
    assert math.exp(mean) * (1 - 1e-12) <= m["multiplicative_error"]
    assert m["multiplicative_error"] <= (1 + mean * math.expm1(most) / most if most else 1) * (1 + 1e-9)
