"""An architecture that packed groups would compute wrongly is refused before anything depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, GPT2Config, Mamba2Config, PreTrainedConfig, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from dpo_ray.errors import ConfigError
from dpo_ray.models.load import load_policy
from dpo_ray.models.probe import KNOWN_EXACT


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
    ],
    ids=lambda c: c.model_type,
)
def test_an_architecture_that_mixes_tokens_otherwise_is_refused(config: PreTrainedConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=config.model_type):
        load_policy(saved(config, tmp_path), torch.float32, 64)


def test_every_family_on_the_list_is_one_that_the_parity_tests_show_or_shares_its_code(tmp_path: Path) -> None:
    """qwen2 is not among the parity tests' families: probe it here."""
    from dpo_ray.models import probe

    config = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=64,
    )
    policy = load_policy(saved(config, tmp_path), torch.float32, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "KNOWN_EXACT", frozenset())
        probe.check_segments(policy, "here")
