"""Gradient norms against torch's own, and by group of parameters."""

from __future__ import annotations

import pytest
import torch

from dpo_ray.config.objective import SigmoidObjective
from dpo_ray.train.gradients import clip_gradients, group_of
from dpo_ray.train.step import losses
from tests.helpers.training import make_config, make_groups, make_policy, rows_of


def with_gradients() -> torch.nn.Module:
    policy = make_policy()
    for loss, *_ in losses(policy, [rows_of(make_groups(3))], make_config(objective=SigmoidObjective()), 0, False):
        loss.backward()
    return policy


@pytest.mark.parametrize("max_norm", [None, 1e-3, 1e3])
def test_norm_and_clipping_are_torchs(max_norm: float | None) -> None:
    ours, theirs = with_gradients(), with_gradients()
    norm, by_group = clip_gradients(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
    assert norm == pytest.approx(float(expected), rel=1e-5)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert sum(v**2 for v in by_group.values()) == pytest.approx(norm**2, rel=1e-6)
    assert {"grad_norm/attention", "grad_norm/embed", "grad_norm/mlp", "grad_norm/norm"} <= by_group.keys()


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.model.embed_tokens.weight", "embed"),
        ("model.model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.model.layers.3.post_attention_layernorm.weight", "norm"),
        ("model.model.layers.3.mlp.experts.7.w1.weight", "mlp"),
        ("model.lm_head.weight", "head"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group
