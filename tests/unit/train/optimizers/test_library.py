"""8-bit and paged AdamW by bitsandbytes, and Adafactor: as torch's where they can be, and the same however they are sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_ray.config.train import OptimizerConfig
from dpo_ray.train.optimizers.blockwise_adamw import BlockwiseAdamW
from dpo_ray.train.optimizers.build import build_optimizer
from tests.helpers.processes.optimizers import OPTIMIZERS, SAVED, make_model, train_rank, train_steps
from tests.helpers.ranks import run_ranks
from tests.helpers.training import distance

pytest.importorskip("bitsandbytes", reason="8-bit and paged optimizers are bitsandbytes'")

# Sums over ranks are rounded in another order, which can take a value across the bound of two that 8 bits stand for.
TOLERANCES = {name: 1e-4 if config.type.endswith("8bit") else 2e-5 for name, config in OPTIMIZERS.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("optimizers") / "model")


@pytest.fixture(scope="module")
def two_processes(model: Path) -> Path:
    run_ranks(train_rank, 2, model.parent)
    return model.parent


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, dict[str, Tensor]]:
    """Four steps in one process, without a pause and without sharding."""
    return {name: train_steps(model, name, 1, 0, 0, 4, None, save=False) for name in OPTIMIZERS}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_and_a_checkpoint_change_nothing(
    name: str, two_processes: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    assert distance(load_file(two_processes / f"{name}.safetensors"), alone[name]) < TOLERANCES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rank_goes_on_from_two(
    name: str, model: Path, two_processes: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    weights = train_steps(model, name, 1, 0, SAVED, 4, two_processes / name, save=False)
    assert distance(weights, alone[name]) < TOLERANCES[name]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_is_bit_for_bit_undisturbed(
    name: str, model: Path, tmp_path: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    train_steps(model, name, 1, 0, 0, SAVED, tmp_path, save=True)
    weights = train_steps(model, name, 1, 0, SAVED, 4, tmp_path, save=False)
    assert all(torch.equal(weights[n], alone[name][n]) for n in weights)


def test_paged_is_torchs_adamw(alone: dict[str, dict[str, Tensor]]) -> None:
    assert distance(alone["paged_adamw"], alone["adamw"]) < 1e-5


def test_eight_bits_are_nearly_as_good(model: Path, alone: dict[str, dict[str, Tensor]]) -> None:
    before = load_file(model / "model.safetensors")
    moved = {n: alone["adamw"][n] - before[n] for n in before}
    moved_8bit = {n: alone["adamw_8bit"][n] - before[n] for n in before}
    assert 1e-4 < distance(moved_8bit, moved) < 0.1


def test_a_quarter_of_the_state() -> None:
    weight, norm = nn.Parameter(torch.zeros(64, 512)), nn.Parameter(torch.zeros(512))
    optimizer = build_optimizer(nn.ParameterList([weight, norm]), OptimizerConfig(type="adamw_8bit"))
    assert isinstance(optimizer, BlockwiseAdamW)
    size = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values())
    assert size < 0.26 * 2 * 4 * weight.numel()
    assert optimizer.state[norm]["exp_avg"].dtype == torch.float32


def test_adafactor_is_torchs() -> None:
    config = OptimizerConfig(type="adafactor", learning_rate=0.01, weight_decay=0.1)
    torch.manual_seed(0)
    mine, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(mine.state_dict())
    own = build_optimizer(mine, config)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    library = torch.optim.Adafactor(groups, lr=0.01)
    for _ in range(5):
        x = torch.randn(11, 7)
        for module, optimizer in ((mine, own), (theirs, library)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)
