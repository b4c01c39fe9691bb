"""The figures of a round's policy that need no judge: against which policy each is measured."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_ray.config.online import RoundEvaluationConfig
from dpo_ray.online.measure import PolicySamples, figures_of

CONFIG = RoundEvaluationConfig(bootstrap_samples=200)
KL = np.array([0.5, 1.5])


def samples(lengths: tuple[int, int], rewards: list[float] | None) -> PolicySamples:
    return PolicySamples([(1,), (2,)], [(7,) * n for n in lengths], [True, True], ["a", "b"], rewards)


def figures(ours: list[float] | None, previous: list[float] | None) -> dict:
    return figures_of(samples((3, 5), ours), samples((1, 1), [0.0, 0.0]), samples((9, 9), previous), KL, CONFIG, seed=0)


def test_rewards_are_compared_with_the_previous_policy_and_lengths_with_the_initial() -> None:
    measured = figures([0.5, 0.75], [0.75, 1.0])
    assert measured["true_reward_gain"] == -0.25  # worse than the previous policy, though better than the initial one
    assert measured["true_reward_gain_interval"] == [-0.25, -0.25]  # both prompts lose the same
    assert (measured["mean_tokens"], measured["initial_mean_tokens"]) == (4, 1)
    assert measured["kl"] == 1.0
    assert measured["kl_standard_error"] == pytest.approx(0.5)
    assert measured["prompts"] == 2


@pytest.mark.parametrize(("ours", "previous"), [(None, [0.0, 0.0]), ([0.0, 0.0], None)])
def test_without_true_rewards_there_is_no_gain(ours: list[float] | None, previous: list[float] | None) -> None:
    assert not {"true_reward_gain", "true_reward_gain_interval"} & figures(ours, previous).keys()
