"""The learning rate against hand values, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from dpo_ray.config.train import OptimizerConfig
from dpo_ray.train.optimizers.build import build_optimizer, learning_rate_factor, set_learning_rate
from tests.helpers.training import make_policy

Decay = Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"]


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        # 10 steps, the first 2 of them warm-up: then progress 0, 1/8, ..., 7/8
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (
            "cosine",
            [1 / 3, 2 / 3, 1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602],
        ),
        # sqrt(2 / (2 + steps since the warm-up))
        ("inverse_sqrt", [1 / 3, 2 / 3, 1, 0.8164966, 0.7071068, 0.6324555, 0.5773503, 0.5345225, 0.5, 0.4714045]),
        ("wsd", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),  # the last 4 steps decay
    ],
)
def test_factors(decay: Decay, expected: list[float]) -> None:
    config = OptimizerConfig(decay=decay, warmup_fraction=0.2, decay_fraction=0.4)
    assert [learning_rate_factor(s, 10, config) for s in range(10)] == pytest.approx(expected, abs=1e-7)


def test_warm_up_by_steps() -> None:
    config = OptimizerConfig(decay="constant", warmup_fraction=0.9, warmup_steps=2)
    assert [learning_rate_factor(s, 10, config) for s in range(4)] == [1 / 3, 2 / 3, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_without_warm_up_the_first_step_has_the_whole_rate(decay: Decay) -> None:
    config = OptimizerConfig(decay=decay, warmup_fraction=0.0)
    assert learning_rate_factor(0, 7, config) == 1.0
    assert learning_rate_factor(0, 1, config) == 1.0


def test_a_part_of_a_warm_up_step_is_a_whole_one() -> None:
    config = OptimizerConfig(decay="constant", warmup_fraction=0.1)
    assert [learning_rate_factor(s, 15, config) for s in range(3)] == [1 / 3, 2 / 3, 1.0]  # 1.5 steps


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_fraction": 0.99}, {"warmup_steps": 50}, {"warmup_steps": 0}])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11])
def test_every_step_moves_the_weights(decay: Decay, warmup: dict[str, Any], steps: int) -> None:
    config = OptimizerConfig(decay=decay, **warmup)
    assert all(0 < learning_rate_factor(s, steps, config) <= 1 for s in range(steps))


@pytest.mark.parametrize(("decay", "last"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0), ("wsd", 0.0)])
def test_beyond_the_end_the_rate_stays_at_its_end(decay: Decay, last: float) -> None:
    config = OptimizerConfig(decay=decay, warmup_fraction=0.2)
    assert learning_rate_factor(10, 10, config) == pytest.approx(last)
    assert learning_rate_factor(12, 10, config) == pytest.approx(last)


def test_after_the_warm_up_the_factors_are_those_of_transformers() -> None:
    """Theirs begin with a step of rate 0, which moves nothing."""
    from transformers import get_scheduler

    decays: list[Decay] = ["linear", "cosine", "inverse_sqrt", "constant"]
    for decay in decays:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        name = "constant_with_warmup" if decay == "constant" else decay
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=30)
        config = OptimizerConfig(decay=decay, warmup_fraction=0.1)
        for step in range(30):
            factor = learning_rate_factor(step, 30, config)
            assert step < 3 or scheduler.get_last_lr()[0] == pytest.approx(factor, abs=1e-12)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_wsd_is_transformers_with_a_linear_decay(warmup_steps: int) -> None:
    from transformers import get_wsd_schedule

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_wsd_schedule(optimizer, warmup_steps, 6, num_training_steps=30, decay_type="linear")
    config = OptimizerConfig(decay="wsd", warmup_steps=warmup_steps, decay_fraction=0.2)
    for step in range(32):
        factor = learning_rate_factor(step, 30, config)
        assert step < warmup_steps or scheduler.get_last_lr()[0] == pytest.approx(factor, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_rate_is_set_on_every_group() -> None:
    config = OptimizerConfig(learning_rate=4e-4, decay="cosine", warmup_fraction=0.2)
    optimizer = build_optimizer(make_policy(), config)
    rate = set_learning_rate(optimizer, 4, 10, config)
    assert rate == pytest.approx(4e-4 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert [g["lr"] for g in optimizer.param_groups] == [rate] * 2


def test_vectors_do_not_decay() -> None:
    policy = make_policy()
    optimizer = build_optimizer(policy, OptimizerConfig(weight_decay=0.1))
    decaying = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    every = {id(p) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in policy.named_parameters():
        assert id(parameter) in every
        assert (id(parameter) in decaying) == (not name.endswith("norm.weight")), name
    # With zero gradients only decay moves weights, and by exactly rate * decay.
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0, 1, OptimizerConfig(learning_rate=0.5, warmup_fraction=0.0))
    optimizer.step()
    for name, parameter in policy.named_parameters():
        factor = 1.0 if name.endswith("norm.weight") else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_frozen_parameters_are_left_out() -> None:
    policy = make_policy()
    policy.model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = build_optimizer(policy, OptimizerConfig())
    frozen = id(policy.model.get_input_embeddings().weight)
    assert frozen not in {id(p) for g in optimizer.param_groups for p in g["params"]}
