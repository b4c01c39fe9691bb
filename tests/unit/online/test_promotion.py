"""Which rounds are promoted, which are the last, and what is said of it."""

from __future__ import annotations

import math

import pytest

from dpo_ray.config.online import PromotionConfig, StopConfig
from dpo_ray.online.promotion import DecidedRound, Decision, RoundFigures, decide, stop_reason

# Rule: its limit, the figures at it, on the good side, on the bad side.
RULES = {
    "min_win_rate_against_previous": (0.5, "win_rate_against_previous", 0.5, 0.75, 0.25),
    "min_win_rate_against_initial": (0.6, "win_rate_against_initial", 0.6, 0.75, 0.5),
    "min_true_reward_gain": (-0.1, "true_reward_gain", -0.1, 0.0, -0.25),
    "max_kl": (8, "kl", 8.0, 2.5, 9.5),
    "min_heldout_accuracy": (0.6, "heldout_accuracy", 0.6, 0.75, 0.5),
    "max_length_growth": (1.5, "mean_tokens", 150.0, 90.0, 200.0),
}


def figures(**values: float) -> RoundFigures:
    return RoundFigures(**{"initial_mean_tokens": 100.0, **values})


def test_the_table_has_every_rule() -> None:
    assert RULES.keys() == PromotionConfig.model_fields.keys()


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_alone(rule: str) -> None:
    limit, name, at, good, bad = RULES[rule]
    config = PromotionConfig(**{rule: limit})
    assert decide(figures(**{name: at}), config).promoted
    assert decide(figures(**{name: good}), config).promoted
    rejected = decide(figures(**{name: bad}), config)
    assert not rejected.promoted
    shown = 2 if name == "mean_tokens" else bad  # the growth is 200 tokens over 100
    assert f"is {shown:g}, not at" in rejected.reasons[0]
    assert f"promote_if.{rule}={limit:g}" in rejected.reasons[0]
    assert not decide(figures(**{name: math.nan}), config).promoted


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_measured_breaks_its_rule(rule: str) -> None:
    decision = decide(RoundFigures(), PromotionConfig(**{rule: RULES[rule][0]}))
    assert not decision.promoted
    assert len(decision.reasons) == 1
    assert decision.reasons[0].endswith(f"is not measured, and promote_if.{rule} needs it")


def test_growth_needs_the_initial_length() -> None:
    config = PromotionConfig(max_length_growth=1.5)
    assert "not measured" in decide(RoundFigures(mean_tokens=10), config).reasons[0]
    assert "not measured" in decide(RoundFigures(mean_tokens=10, initial_mean_tokens=0), config).reasons[0]


def test_without_rules_a_round_is_promoted_always() -> None:
    assert decide(RoundFigures(), PromotionConfig()) == Decision(True, ("promote_if sets no rule",))


def test_all_rules_must_hold_and_each_has_its_sentence() -> None:
    rules = PromotionConfig(min_win_rate_against_previous=0.5, max_kl=8, min_heldout_accuracy=0.6)
    decision = decide(figures(win_rate_against_previous=0.531, kl=9.25, heldout_accuracy=0.7), rules)
    assert decision == Decision(
        False,
        (
            "the KL to the initial policy is 9.25, not at most promote_if.max_kl=8",
            "the win rate against the previous policy is 0.531, at least 0.5",
            "the held-out accuracy is 0.7, at least 0.6",
        ),
    )


def over(promoted: bool = True, **values: float) -> DecidedRound:
    return DecidedRound(RoundFigures(**values), promoted)


def gains(*rates: float | None) -> list[DecidedRound]:
    return [DecidedRound(RoundFigures(win_rate_against_previous=rate), True) for rate in rates]


def test_nothing_stops_without_rules_or_rounds() -> None:
    assert stop_reason([over(False, kl=1e9, win_rate_against_initial=1.0)] * 9, StopConfig()) is None
    assert stop_reason([], StopConfig(kl_budget=1, rounds_without_gain=1, target_win_rate=0.5)) is None


@pytest.mark.parametrize(("rule", "figure"), [("kl_budget", "kl"), ("target_win_rate", "win_rate_against_initial")])
def test_a_promoted_round_that_reaches_the_limit_is_the_last(rule: str, figure: str) -> None:
    config = StopConfig(**{rule: 0.75})
    assert stop_reason([over(**{figure: 0.5})], config) is None
    assert stop_reason([over()], config) is None  # not measured
    assert stop_reason([over(**{figure: 0.5}), over(False, **{figure: 0.9})], config) is None  # its policy is not kept
    said = stop_reason([over(**{figure: 0.5}), over(**{figure: 0.75}), over(False, **{figure: 0.1})], config)
    assert said is not None
    assert said.startswith("round 2 has")
    assert said.endswith(f"of 0.75, and stop_if.{rule} is 0.75")


def test_rounds_without_gain() -> None:
    config = StopConfig(rounds_without_gain=2)
    assert stop_reason(gains(0.5), config) is None
    assert stop_reason(gains(0.5, 0.4), config) == (
        "the last 2 rounds brought no gain, and stop_if.rounds_without_gain is 2"
    )
    assert stop_reason(gains(0.4, 0.4, 0.51), config) is None
    assert stop_reason(gains(0.4, 0.51, 0.4), config) is None
    assert stop_reason(gains(0.6, None, 0.4), config) is not None  # what is not measured shows no gain
    rejected = over(False, win_rate_against_previous=0.9)
    assert stop_reason([*gains(0.9), rejected, rejected], config) is not None
    assert stop_reason([*gains(0.9), rejected], config) is None
