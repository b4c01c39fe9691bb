"""Moments that are handed on: the optimizer goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dpo_ray.config.train import OptimizerConfig
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.optimizers.moments import gather_moments, scatter_moments


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def step(policy: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    policy(batch).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_another_optimizer_goes_on_with_the_same_bits(kind: str) -> None:
    config = OptimizerConfig(type=kind, learning_rate=1e-2)
    undisturbed, first = model(), model()
    whole, half = build_optimizer(undisturbed, config), build_optimizer(first, config)
    for number in range(3):
        step(undisturbed, whole, number)
        step(first, half, number)
    moments = gather_moments(first, half)
    second = model()
    second.load_state_dict(first.state_dict())
    rest = build_optimizer(second, config)
    scatter_moments(second, rest, moments)
    for number in range(3, 6):
        step(undisturbed, whole, number)
        step(second, rest, number)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_an_optimizer_that_begins_anew_takes_another_way() -> None:
    """What the test above would not see if moments changed nothing."""
    config = OptimizerConfig(type="adamw", learning_rate=1e-2)
    undisturbed, other = model(), model()
    whole = build_optimizer(undisturbed, config)
    for number in range(3):
        step(undisturbed, whole, number)
    other.load_state_dict(undisturbed.state_dict())
    anew = build_optimizer(other, config)
    step(undisturbed, whole, 3)
    step(other, anew, 3)
    assert not torch.equal(undisturbed[0].weight, other[0].weight)
