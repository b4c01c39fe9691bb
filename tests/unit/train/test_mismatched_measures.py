"""Completions of other prompts, from which KTO estimates its KL, count in no other measure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_ray.config.objective import KtoObjective
from dpo_ray.data.groups import Group
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.step import train_step
from tests.helpers.training import make_config, make_groups, make_policy, optimizer_config, rows_of

NONE = np.zeros(0, np.int32)


def labelled(others: int) -> list[Group]:
    """Make labelled completions, each followed by one of another prompt; `others` chooses the latter."""
    rng = np.random.default_rng(others)
    groups = []
    for number, group in enumerate(make_groups(3)):
        other = rng.integers(3, 700, 4 + others, dtype=np.int32)
        completions, scores = (group.completion_ids[0], other), np.array([number % 2, np.nan], np.float32)
        known = tuple(np.full(len(ids), -6, np.float32) for ids in completions)
        facts = {"completion_ids": completions, "scores": scores, "reference_token_logps": known}
        groups.append(replace(group, chosen=NONE, rejected=NONE, **facts))
    return groups


def measured(groups: list[Group]) -> dict[str, float]:
    policy = make_policy()
    config = make_config(objective=KtoObjective(beta=0.5))
    return train_step(
        policy, [rows_of(groups)], config, build_optimizer(policy, optimizer_config()), with_statistics=True
    )


def test_they_count_in_kl_alone() -> None:
    first, second = measured(labelled(1)), measured(labelled(2))
    assert first["kl"] != pytest.approx(second["kl"], rel=0.01)
    for name in ("logratio", "reference_drift", "entropy"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)


def test_log_ratio_and_drift_are_those_of_labelled_completions() -> None:
    groups, sums = labelled(1), np.zeros(4)
    for group in groups:
        with torch.no_grad():
            logps = make_policy()(rows_of([group])).logps.numpy().astype(np.float64)
        own = logps[: len(group.completion_ids[0])] - group.reference_token_logps[0]
        sums += group.weight * np.array([own.sum(), 1, np.abs(own).sum(), len(own)])
    step = measured(groups)
    assert step["logratio"] == pytest.approx(sums[0] / sums[1], rel=1e-4)
    assert step["reference_drift"] == pytest.approx(sums[2] / sums[3], rel=1e-4)
