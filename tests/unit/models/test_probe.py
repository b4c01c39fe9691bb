"""An architecture that packed groups would compute wrongly is refused before anything depends on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    Llama4TextConfig,
    Mamba2Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from dpo_ray.errors import ConfigError
from dpo_ray.models import probe
from dpo_ray.models.load import load_policy
from dpo_ray.models.probe import KNOWN_EXACT

from .families import family_config
from .test_token_logps import FAMILIES

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.25,
}


def saved(config: PreTrainedConfig, place: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def test_an_exact_architecture_that_is_not_on_the_list_passes_the_probe(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    assert config.model_type not in KNOWN_EXACT
    load_policy(saved(config, tmp_path), torch.float32, 64)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(
            hidden_size=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.5
        ),  # ALiBi: positions by row
        Mamba2Config(hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1, vocab_size=64),
        # Windows and chunks longer than the probe's sequences, known to the masks that packed rows do without.
        Qwen2MoeConfig(
            **SMALL,
            num_experts=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            use_sliding_window=True,
            sliding_window=40,
            max_window_layers=0,
        ),
        Llama4TextConfig(
            **SMALL,
            head_dim=8,
            num_local_experts=2,
            intermediate_size_mlp=64,
            attention_chunk_size=40,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        Gemma2Config(**SMALL, head_dim=8, use_bidirectional_attention=True),  # an embedding model's
    ],
    ids=lambda c: c.model_type,
)
def test_an_architecture_that_mixes_tokens_otherwise_is_refused(config: PreTrainedConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=config.model_type):
        load_policy(saved(config, tmp_path), torch.float32, 64)


def test_the_probe_leaves_windows_as_they_are(tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=40)
    policy = load_policy(saved(config, tmp_path), torch.float32, 64)
    assert policy.model.config.sliding_window == 40
    assert policy.model.config.model_type not in KNOWN_EXACT


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "phi", "phi3", "cohere"])
def test_the_probe_agrees_about_families_that_are_let_through(
    name: str, family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(family(name), torch.float32, 64)
    assert policy.model.config.model_type in KNOWN_EXACT
    monkeypatch.setattr(probe, "KNOWN_EXACT", frozenset())
    probe.check_segments(policy, "here")


def test_every_family_that_is_let_through_is_one_that_the_parity_tests_show() -> None:
    assert {family_config(name).model_type for name in FAMILIES} == KNOWN_EXACT
