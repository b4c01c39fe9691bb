"""Figures of a policy's samples and of held-out pairs, against the standard library's statistics and hand values."""

from __future__ import annotations

import math
import statistics

import pyarrow as pa
import pytest

from dpo_ray.evaluate.metrics import Comparison, Sample, heldout_by_set, heldout_figures, reward_figures, sample_figures

POLICY = (
    Sample((1, 2, 3), policy_logp=-2.0, reference_logp=-3.0, ended=True),
    Sample((1,), policy_logp=-1.0, reference_logp=-3.0, ended=True),
    Sample((1, 2), policy_logp=-0.5, reference_logp=-5.0, ended=True),
    Sample((4, 5), policy_logp=-4.0, reference_logp=-3.5, ended=False),
)
REFERENCE = (
    Sample((1,), policy_logp=-9.0, reference_logp=-1.0, ended=True),
    Sample((1, 2, 3, 4, 5), policy_logp=-8.0, reference_logp=-2.0, ended=False),
)


def standard_error(values: list[float]) -> float:
    """Compute the sample's standard deviation, by n - 1, over the root of n."""
    return statistics.stdev(values) / math.sqrt(len(values))


def test_the_kl_is_the_mean_log_ratio_of_the_policys_own_samples() -> None:
    ratios = [1.0, 2.0, 4.5, -0.5]
    assert sample_figures(Comparison(((1,), (2,)), POLICY, REFERENCE)) == {
        "samples": 4,
        "kl": 1.75,
        "kl_standard_error": pytest.approx(standard_error(ratios), rel=1e-12),
        "policy_tokens": 2.0,
        "reference_tokens": 3.0,
        "policy_ended": 0.75,
        "reference_ended": 0.5,
    }


def test_of_two_samples_the_standard_error_is_half_their_distance() -> None:
    figures = sample_figures(Comparison(((1,),), POLICY[:2], ()))
    assert (figures["kl"], figures["kl_standard_error"]) == (1.5, pytest.approx(0.5, rel=1e-12))
    assert (figures["reference_tokens"], figures["reference_ended"]) == (0.0, 0.0)


def test_one_sample_has_no_standard_error() -> None:
    figures = sample_figures(Comparison(((1,),), POLICY[:1], REFERENCE[:1]))
    assert (figures["samples"], figures["kl"], figures["kl_standard_error"]) == (1, 1.0, 0.0)


def test_the_gain_in_reward_is_compared_prompt_by_prompt() -> None:
    policy, reference = [3.0, 1.0, 4.0], [1.0, 1.5, -1.0]
    gains = [2.0, -0.5, 5.0]
    assert reward_figures(policy, reference) == {
        "policy_true_reward": pytest.approx(8 / 3),
        "reference_true_reward": 0.5,
        "true_reward_gain": pytest.approx(6.5 / 3),
        "true_reward_gain_standard_error": pytest.approx(standard_error(gains)),
        "true_reward_gain_in_sd": pytest.approx(6.5 / 3 / statistics.pstdev(reference)),
    }


def test_a_gain_in_small_rewards_is_in_their_unit() -> None:
    assert reward_figures([0.5, 0.25], [0.25, 0.0])["true_reward_gain_in_sd"] == pytest.approx(0.25 / 0.125)


def test_a_gain_is_in_no_unit_where_all_rewards_of_the_reference_agree() -> None:
    figures = reward_figures([2.0, 4.0], [1.0, 1.0])
    assert figures["true_reward_gain_in_sd"] == 0.0
    assert figures["true_reward_gain_standard_error"] == pytest.approx(1.0)
    assert reward_figures([2.0], [1.0]) == {
        "policy_true_reward": 2.0,
        "reference_true_reward": 1.0,
        "true_reward_gain": 1.0,
        "true_reward_gain_standard_error": 0.0,
        "true_reward_gain_in_sd": 0.0,
    }


def heldout(**columns: list[float]) -> pa.Table:
    """Build a table of held-out pairs of the set `a`."""
    return pa.table({**columns, "split": ["eval_a"] * len(columns["loss"])})


def test_held_out_pairs_are_averaged_by_weight() -> None:
    """Weights 1, 1 and 2. The longer completion is preferred once, once it is a tie, and once it is not."""
    table = heldout(
        loss=[0.5, 0.75, 1.0],
        reward_chosen=[1.0, 2.0, 3.0],
        reward_rejected=[0.0, 4.0, 1.0],
        accurate=[1.0, 0.0, 1.0],
        weight=[1.0, 1.0, 2.0],
        tokens_chosen=[9.0, 5.0, 5.0],
        tokens_rejected=[4.0, 5.0, 6.0],
    )
    expected = {
        "pairs": 3,
        "loss": 3.25 / 4,
        "rewards/chosen": 9.0 / 4,
        "rewards/rejected": 6.0 / 4,
        "rewards/margins": 3.0 / 4,
        "rewards/accuracies": 3.0 / 4,
        "accuracy_standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 3)),
        "longer_wins": (1.0 + 0.5 + 0.0) / 4,
    }
    assert heldout_figures(table) == expected
    assert heldout_by_set(table) == {"a": expected}
