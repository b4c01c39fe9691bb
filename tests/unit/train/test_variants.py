"""Sharding over one, two and four ranks (hybrid), recomputation, offload: none of them changes what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.models.builtin import builtin_model
from tests.helpers.processes.variants import VARIANTS, train_variants
from tests.helpers.ranks import run_ranks


def run(world: int, directory: Path, asked: str = "all") -> dict[str, list[list[float]]]:
    directory.mkdir()
    run_ranks(train_variants, world, directory, asked)
    return json.loads((directory / "measured.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one") / "w1"


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, list[list[float]]]:
    return run(1, place)


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def test_recomputation_and_offload_change_nothing(alone: dict[str, list[list[float]]]) -> None:
    for name in VARIANTS:
        like = "adapter" if name.startswith("adapter") else "plain"
        assert flat(alone[name]) == pytest.approx(flat(alone[like]), rel=1e-6), name
    assert alone["plain"][0][0] == pytest.approx(alone["adapter"][0][0], rel=1e-6)  # an adapter begins as nothing
    assert alone["plain"][3] != pytest.approx(alone["adapter"][3], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_more_ranks_change_nothing(world: int, alone: dict[str, list[list[float]]], tmp_path: Path) -> None:
    """Four ranks are two replicas of two shards."""
    for name, rows in run(world, tmp_path / "w").items():
        for (loss, norm), (expected_loss, expected_norm) in zip(rows, alone[name], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5), name
            assert norm == pytest.approx(expected_norm, rel=1e-5), name


@pytest.mark.usefixtures("alone")
def test_an_adapter_leaves_the_model_as_it_is(place: Path) -> None:
    base = load_file(builtin_model("sentiment_llama") / "model.safetensors")
    after, trained = load_file(place / "base of adapter.safetensors"), load_file(place / "adapter.safetensors")
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert all(weight.any() for name, weight in trained.items() if ".lora_B." in name)
    assert not any(weight.any() for name, weight in trained.items() if ".lora_" not in name)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_blocks_compute_the_same(world: int, tmp_path: Path) -> None:
    """Compiled sums are rounded in another order, which an optimizer step enlarges."""
    rows = run(world, tmp_path / "w", "compiled")
    for name in rows:
        assert rows[name][0] == pytest.approx(rows["plain"][0], rel=1e-5), name
        assert flat(rows[name]) == pytest.approx(flat(rows["plain"]), rel=1e-3), name
