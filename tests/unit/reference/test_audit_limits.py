"""Each limit of the audit trips by itself, at its default and where the recipe sets it, and says what it means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dpo_ray.config.reference import AuditConfig
from dpo_ray.errors import AuditError
from dpo_ray.reference.audit import measure
from dpo_ray.reference.audit_limits import DEFAULT_LIMITS, Judgement, check_drift, goes_on, judge
from tests.helpers.audited_groups import SAMPLE, group

PAIRS, TOKENS = 64, 40


def verdict(
    measured: dict[str, Any], dtype: str = "bfloat16", beta: float = 0.1, config: AuditConfig | None = None
) -> Judgement:
    return judge(measured, config or AuditConfig(), dtype, beta, per_token=False)


def noisy(noise: float, bias: float = 0.0, seed: int = 0, pairs: int = PAIRS, tokens: int = TOKENS) -> dict[str, Any]:
    """Measure pairs of completions of `tokens` whose log-probs differ by independent noise and a bias."""
    rng = np.random.default_rng(seed)
    own = np.full(tokens, -3.0)
    return measure(
        [
            group(i, [list(own + bias + noise * rng.standard_normal(tokens)) for _ in range(2)], [list(own)] * 2)
            for i in range(pairs)
        ]
    )


def drifting(**completions: list[float]) -> dict[str, Any]:
    """Measure 64 pairs whose completions all drift by the same given d."""
    stored = [[-9.0 + d for d in completions[name]] for name in ("chosen", "rejected")]
    return measure([group(i, stored, [[-9.0] * len(c) for c in stored]) for i in range(PAIRS)])


def over(judgement: Judgement) -> list[str]:
    return [f.name for f in judgement.over]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_limit_has_a_default_for_every_type(dtype: str) -> None:
    assert set(DEFAULT_LIMITS[dtype]) == {name for name in AuditConfig.model_fields if name.startswith("max_")}
    fields = {f.field: f.limit for f in verdict(noisy(0), dtype).findings if f.field}
    assert fields == DEFAULT_LIMITS[dtype]


def test_the_defaults_let_rounding_through_as_it_was_measured() -> None:
    """vLLM against a plain forward: 2.7e-6 a token in float32; in bfloat16 an RMS of 0.036, over 300 tokens each."""
    assert verdict(noisy(3.4e-6), "float32").passed
    assert verdict(noisy(0.036, tokens=300)).passed
    assert not verdict(noisy(0.036, tokens=300), "float32").passed


def lengths(error: float, difference: int) -> list[list[float]]:
    """Return the differences d of two completions of unlike lengths, with the pair's error on the first token."""
    return [[error] + [0.0] * (19 + difference), [0.0] * 20]


def spread(error: float) -> dict[str, Any]:
    """Measure pairs whose error is +error in one half and -error in the other: no bias, a standard deviation of `error`."""
    sample = []
    for i in range(PAIRS):
        d = lengths(error if i % 2 else -error, 0)
        sample.append(group(i, [[-9.0 + x for x in c] for c in d], [[-9.0] * len(c) for c in d]))
    return measure(sample)


@pytest.mark.parametrize(
    ("measured", "dtype", "tripped"),
    [
        # one token of 80: the mean stays small; both completions drift alike, so no pair has an error
        (drifting(chosen=[0.6, -0.6] + [0.0] * 78, rejected=[0.0] * 80), "bfloat16", "max_token_drift"),
        (drifting(chosen=[2e-3, -2e-3] + [0.0] * 78, rejected=[0.0] * 80), "float32", "max_token_drift"),
        # every token, up and down
        (drifting(chosen=[0.06, -0.06] * 20, rejected=[0.06, -0.06] * 20), "bfloat16", "mean_token_drift"),
        (drifting(chosen=[2e-4, -2e-4] * 20, rejected=[2e-4, -2e-4] * 20), "float32", "mean_token_drift"),
        # every token a little upwards, alike in both completions
        (drifting(chosen=[3e-3] * 20, rejected=[3e-3] * 20), "bfloat16", "signed_bias"),
        (drifting(chosen=[6e-5] * 20, rejected=[6e-5] * 20), "float32", "signed_bias"),
        # and as much downwards
        (drifting(chosen=[-3e-3] * 20, rejected=[-3e-3] * 20), "bfloat16", "signed_bias"),
        (drifting(chosen=[-6e-5] * 20, rejected=[-6e-5] * 20), "float32", "signed_bias"),
    ],
)
def test_each_limit_on_tokens_trips_alone(measured: dict[str, Any], dtype: str, tripped: str) -> None:
    assert over(verdict(measured, dtype)) == [tripped]


def test_the_limit_on_margins_trips_alone_and_goes_with_beta() -> None:
    measured = spread(0.4)  # 0.4 nats of standard deviation, 0.01 a token on average
    assert over(verdict(measured, beta=0.1)) == []
    assert over(verdict(measured, beta=0.5)) == ["margin_error"]
    finding = next(f for f in verdict(measured, beta=0.5).findings if f.name == "margin_error")
    assert finding.value == pytest.approx(0.5 * 0.4)


def test_an_objective_per_token_sees_the_margin_per_token() -> None:
    measured = spread(0.4)
    by_token = judge(measured, AuditConfig(), "bfloat16", 0.5, per_token=True)
    assert by_token.passed
    assert next(f for f in by_token.findings if f.name == "margin_error").value == pytest.approx(0.5 * 0.4 / 20)


@pytest.mark.parametrize("field", ["max_token_drift", "max_mean_drift", "max_bias", "max_margin_error"])
def test_the_recipes_limit_rules_and_just_meeting_it_passes(field: str) -> None:
    wide = dict.fromkeys(DEFAULT_LIMITS["float32"], 1e3)
    measured = drifting(chosen=[0.25] * 4, rejected=[0.25] * 4) if field != "max_margin_error" else spread(0.25)
    finding = next(f for f in verdict(measured, beta=1.0).findings if f.field == field)
    assert finding.value == pytest.approx(0.25, abs=1e-12)
    assert verdict(measured, beta=1.0, config=AuditConfig.model_validate(wide)).passed
    assert verdict(measured, beta=1.0, config=AuditConfig.model_validate({**wide, field: finding.value})).passed
    # An estimate has a chance error; it is none for the bias here, since all groups drift alike.
    tight = finding.value * (0.99 if field != "max_margin_error" else 0.6)
    assert over(verdict(measured, beta=1.0, config=AuditConfig.model_validate({**wide, field: tight}))) == [
        finding.name
    ]


def test_a_tiny_sample_is_called_too_few_and_not_judged_by_chance() -> None:
    """Eight tokens of bfloat16 noise have a mean of 0.01: five times the limit on bias, and no sign of any."""
    measured = noisy(0.03, seed=5, pairs=2, tokens=2)
    assert abs(measured["signed_bias"]) > DEFAULT_LIMITS["bfloat16"]["max_bias"]
    judgement = verdict(measured)
    assert judgement.passed
    assert {f.name: f.verdict for f in judgement.findings}["signed_bias"] == "too few"
    one = verdict(measure(SAMPLE[:1]), config=AuditConfig(max_token_drift=1, max_mean_drift=1))
    assert {f.name: f.verdict for f in one.findings}["margin_error"] == "too few"
    assert one.passed
    few = measure([group(i, [[-9.0 + 0.06] * 3] * 2, [[-9.0] * 3] * 2) for i in range(15)])
    assert over(verdict(few, config=AuditConfig(max_mean_drift=1))) == []
    enough = measure([group(i, [[-9.0 + 0.06] * 3] * 2, [[-9.0] * 3] * 2) for i in range(16)])
    assert over(verdict(enough, config=AuditConfig(max_mean_drift=1))) == ["signed_bias"]
    # A gross error is seen on any sample.
    assert over(verdict(measure(SAMPLE[:1]))) == ["mean_token_drift"]


def test_chance_alone_fails_hardly_any_sample() -> None:
    """Noise as bfloat16 rounds, no bias: none of these samples fails, though many have a bias over the limit."""
    for pairs in (2, 4, 15, 16, 32):
        measured = [noisy(0.03, seed=s, pairs=pairs, tokens=3) for s in range(100)]
        assert sum(abs(m["signed_bias"]) > 2e-3 for m in measured) > 30
        assert sum(not verdict(m).passed for m in measured) == 0, pairs


def test_a_true_bias_is_found_in_the_default_sample() -> None:
    """A bias of twice the limit under the same noise, in 64 pairs of 2 x 40 tokens."""
    assert all(over(verdict(noisy(0.03, bias=4e-3, seed=s))) == ["signed_bias"] for s in range(20))


def test_unpaired_groups_have_no_margin_to_judge() -> None:
    measured = measure([group(i, [[-1.0] * 9], [[-1.0] * 9], ()) for i in range(4)])
    judgement = verdict(measured)
    assert judgement.passed
    assert {f.name: f.verdict for f in judgement.findings}["margin_error"] == "too few"


def test_nothing_compared_is_nothing_shown() -> None:
    judgement = verdict(measure([]))
    assert not judgement.passed
    assert judgement.summary() == "nothing was compared"
    with pytest.raises(AuditError, match="no tokens to compare"):
        check_drift(judgement, AuditConfig(), "vllm")


def stopped(measured: dict[str, Any], engine: str = "vllm", **config: Any) -> str:
    audit_config = AuditConfig(**config)
    with pytest.raises(AuditError) as raised:
        check_drift(judge(measured, audit_config, "bfloat16", 0.1, per_token=False), audit_config, engine)
    return str(raised.value)


def test_the_error_names_every_statistic_that_is_over_with_value_limit_and_cause() -> None:
    said = stopped(drifting(chosen=[0.8] + [0.0] * 39, rejected=[0.0] * 40))
    assert "compared: 64 groups, 64 pairs, 5,120 completion tokens" in said
    assert "max_token_drift 0.8, over 0.5. Largest difference of one token." in said
    assert "template" in said
    assert "signed_bias 0.01, over 0.002. Mean difference with its sign. A bias adds up" in said
    assert "mean_token_drift" not in said
    assert "raise reference.audit.max_token_drift and reference.audit.max_bias" in said
    assert "on_drift=use_trainer" in said


def test_the_error_names_the_groups_that_drift_most() -> None:
    quiet = [group(i, [[-1.0] * 9] * 2, [[-1.0] * 9] * 2) for i in range(20)]
    loud = [group(100 + i, [[-1.0 - i] * 9] * 2, [[-1.0] * 9] * 2) for i in (1, 2, 3, 4)]
    said = stopped(measure([*quiet, *loud]))
    assert f"groups that drift most: {104:032x} (4), {103:032x} (3), {102:032x} (2)\n" in said
    assert f"{101:032x}" not in said


def test_a_strong_correlation_with_length_is_said_where_something_is_over() -> None:
    """A bias of 0.01 a token: the error of every pair is 0.01 times its difference in length."""
    shapes = [(5 + i, 30 - i) for i in range(20)]
    sample = [
        group(i, [[-1.0 + 0.01] * a, [-1.0 + 0.01] * b], [[-1.0] * a, [-1.0] * b]) for i, (a, b) in enumerate(shapes)
    ]
    assert measure(sample)["length_correlation"] == pytest.approx(1, abs=1e-4)
    assert "length_correlation 1. Correlation of a pair's error" in stopped(measure(sample))
    assert "length_correlation" not in stopped(measure(sample[:8]), max_mean_drift=1e-3)
    wide = AuditConfig(max_bias=1.0, max_margin_error=1.0)
    assert verdict(measure(sample), config=wide).passed  # a correlation of small errors is no drift


def test_the_trainer_that_differs_from_itself_is_not_advised_to_itself() -> None:
    said = stopped(spread(9.0), engine="trainer")
    assert "use_trainer" not in said
    assert "the trainer computed both" in said


def test_warn_goes_on_and_the_others_stop() -> None:
    measured = spread(9.0)
    assert goes_on(AuditConfig(on_drift="warn"), "bfloat16", 0.1, False, measured)
    check_drift(verdict(measured), AuditConfig(on_drift="warn"), "vllm")
    for on_drift in ("stop", "use_trainer"):
        assert not goes_on(AuditConfig(on_drift=on_drift), "bfloat16", 0.1, False, measured)
        assert goes_on(AuditConfig(on_drift=on_drift), "bfloat16", 0.1, False, spread(0.0))


def test_figures_are_the_measurement_with_what_was_decided() -> None:
    measured = spread(9.0)
    figures = verdict(measured).figures()
    assert figures["passed"] is False
    assert {k: figures[k] for k in measured} == measured
    assert figures["limits"]["signed_bias"] == 2e-3
    assert figures["verdicts"]["length_correlation"] == "not judged"
    assert figures["margin_error"] == pytest.approx(0.9)
    assert judge(figures, AuditConfig(), "bfloat16", 0.1, per_token=False).findings == verdict(measured).findings
    assert math.isfinite(figures["margin_error"])
