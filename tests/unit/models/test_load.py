"""Finding and identifying models: what is refused, and what makes two models the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpo_ray.config.model import ModelConfig, is_hub_name
from dpo_ray.errors import ConfigError
from dpo_ray.models.load import context_tokens, load_policy, model_directory, model_identity


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        model_directory(ModelConfig(path=str(directory)))
    assert str(directory) in refused.value.where
    return refused.value.what


def test_what_is_no_model_is_refused(tmp_path: Path, family: Callable[[str], Path]) -> None:
    assert "no such model directory" in refusal(tmp_path / "absent")
    place = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    assert model_directory(ModelConfig(path=str(place))) == place
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    assert "safetensors" in refusal(place)
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoModel": "evil.Model"}}))
    assert "auto_map" in refusal(place)
    (place / "config.json").write_text("{")
    assert "config.json" in refusal(place)


def test_an_unknown_builtin_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="sentiment_llama"):
        model_directory(ModelConfig(path="builtin:nothing"))


@pytest.mark.parametrize(
    ("path", "is_hub"),
    [("Qwen/Qwen3-0.6B", True), ("./a/b", False), ("/a/b", False), ("~/b", False), ("a", False), ("a/b/c", False)],
)
def test_hub_names_are_told_from_paths(path: str, is_hub: bool) -> None:
    assert is_hub_name(path) == is_hub


def test_a_model_is_its_bytes(tmp_path: Path, family: Callable[[str], Path]) -> None:
    source = family("llama")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    identity = model_identity(ModelConfig(path=str(source)))
    assert model_identity(ModelConfig(path=str(copy))) == identity
    (copy / "README.md").write_text("not part of it")
    assert model_identity(ModelConfig(path=str(copy))) == identity

    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "changed.safetensors", metadata={"format": "pt"})
    (tmp_path / "changed.safetensors").rename(copy / "model.safetensors")
    assert model_identity(ModelConfig(path=str(copy))) != identity


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, family: Callable[[str], Path]) -> None:
    place = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**settings, "model_type": "nothing_known"}))
    with pytest.raises(ConfigError, match="nothing_known"):
        load_policy(place, torch.float32, 16)


def test_dropout_is_off_even_in_training(tmp_path: Path, family: Callable[[str], Path]) -> None:
    place = Path(shutil.copytree(family("phi"), tmp_path / "model"))
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**settings, "resid_pdrop": 0.5, "embd_pdrop": 0.5}))
    policy = load_policy(place, torch.float32, 16).train()
    dropouts = [m for m in policy.modules() if isinstance(m, nn.Dropout)]
    assert dropouts
    assert all(m.p == 0.0 for m in dropouts)


def test_the_context_is_read_from_the_configuration(family: Callable[[str], Path]) -> None:
    assert context_tokens(family("llama")) == 64


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}},
    ],
)
def test_the_context_of_longrope_ends_where_positions_begin_to_turn_otherwise(stated: dict, tmp_path: Path) -> None:
    """vLLM's own context is one token longer, and must not reach beyond the original one either."""
    published = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", **published, **stated}))
    assert context_tokens(tmp_path) == 4095


def test_the_tiny_longrope_model_says_the_same(family: Callable[[str], Path]) -> None:
    assert context_tokens(family("phi4")) == 2 * 64 - 1
