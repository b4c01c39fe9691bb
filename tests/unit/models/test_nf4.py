"""4-bit weights under an adapter: the layer is the linear layer of its own weights, and two ranks train what one trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpo_ray.models.builtin import builtin_model
from dpo_ray.models.nf4 import Nf4Linear
from tests.helpers.processes.variants import train_variants
from tests.helpers.ranks import run_ranks

pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")


def test_the_layer_is_linear_in_its_rounded_weights() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(128, 96)
    layer = Nf4Linear(plain)
    layer.hold(plain.weight.detach(), torch.float32)
    assert layer.weight.numel() == 128 * 96 // 2
    rounded = nn.Linear(128, 96)
    with torch.no_grad():
        rounded.weight.copy_(layer.whole())
        rounded.bias.copy_(plain.bias)
    ours, theirs = (torch.linspace(-1, 1, 5 * 128).reshape(5, 128).requires_grad_() for _ in range(2))
    torch.testing.assert_close(layer(ours), rounded(theirs))
    layer(ours).square().sum().backward()
    rounded(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_weights_are_those_of_bitsandbytes_own_layer() -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(128, 64, bias=False)
    theirs = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit(plain.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    theirs.to("cpu")
    layer = Nf4Linear(plain)
    layer.hold(plain.weight.detach(), torch.float32)
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-4)
    error = (layer.whole() - plain.weight).norm() / plain.weight.norm()
    assert 0.02 < float(error) < 0.15


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one rank and two leave after some steps."""
    places = {}
    for world in (1, 2):
        place = places[world] = tmp_path_factory.mktemp("nf4") / "w"
        place.mkdir()
        run_ranks(train_variants, world, place, "quantized")
    return places


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(trained: dict[int, Path]) -> None:
    one, two = (json.loads((trained[world] / "measured.json").read_text()) for world in (1, 2))
    for name in one:
        for mine, theirs in zip(two[name], one[name], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5), name
    assert len({loss for loss, _ in one["quantized"]}) == len(one["quantized"])


@pytest.mark.slow
def test_recomputation_changes_nothing(trained: dict[int, Path]) -> None:
    one = json.loads((trained[1] / "measured.json").read_text())
    for mine, theirs in zip(one["quantized, recomputed"], one["quantized"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_the_adapter_alone_is_exported(trained: dict[int, Path]) -> None:
    weights = load_file(trained[2] / "quantized.safetensors")
    assert weights
    assert all(".lora_" in name for name in weights)
    assert any(weight.any() for name, weight in weights.items() if ".lora_B." in name)
    assert not {name for name in weights if name in load_file(builtin_model("sentiment_llama") / "model.safetensors")}
