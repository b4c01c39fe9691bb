"""An architecture gets the layout that it computes exactly, or is refused, before anything depends on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
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
from dpo_ray.models.packed_rows import Layout, packed_rows
from dpo_ray.models.probe import KNOWN_EXACT
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import family_config, plain_model, plain_token_logps, trying_groups
from tests.unit.models.test_token_logps import FAMILIES

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


GPTJ = GPTJConfig(  # attention of its own, which takes no other
    n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, rotary_dim=4, initializer_range=0.25
)
BLOOM = BloomConfig(
    hidden_size=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.5
)  # ALiBi: positions by row
MAMBA = Mamba2Config(hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1, vocab_size=64)
# A window longer than the probe's sequences, which shortens it; attention learns of it besides the mask.
QWEN2_MOE = Qwen2MoeConfig(
    **SMALL,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    use_sliding_window=True,
    sliding_window=12,
    max_window_layers=0,
)


@pytest.mark.parametrize("wanted", ["shared", "packed", "padded"])
@pytest.mark.parametrize(
    ("config", "plainest"),
    [
        (GPTJ, "packed"),
        (QWEN2_MOE, "shared"),
        (BLOOM, "padded"),
        (MAMBA, "padded"),
        (family_config("gpt_oss"), "padded"),
    ],
    ids=lambda c: getattr(c, "model_type", c),
)
def test_an_architecture_falls_back_to_a_layout_that_it_computes_exactly(
    config: PreTrainedConfig, plainest: Layout, wanted: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="dpo_ray.models.probe")
    policy = TokenLogps(plain_model(saved(config, tmp_path)), 16, wanted)
    probe.check_segments(policy, "here")
    layouts = ["shared", "packed", "padded"]
    assert policy.layout == max(wanted, plainest, key=layouts.index)
    groups = trying_groups()
    expected = plain_token_logps(plain_model(tmp_path), groups)
    actual = policy.eval()(packed_rows(pack(groups), "cpu", policy.layout)).logps
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    lines = [r.getMessage() for r in caplog.records if r.name == "dpo_ray.models.probe"]
    assert len(lines) <= 1
    if policy.layout != wanted:
        assert f"`{config.model_type}` uses the layout {policy.layout} instead of {wanted}" in lines[0]


@pytest.mark.parametrize(
    "config",
    [
        Llama4TextConfig(  # its decoder is no module of its own
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
        Qwen2MoeConfig(**SMALL, num_experts=2, num_experts_per_tok=4),  # cannot be run at all
    ],
    ids=lambda c: c.model_type,
)
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_an_architecture_that_no_layout_serves_is_refused(
    config: PreTrainedConfig, layout: Layout, tmp_path: Path
) -> None:
    policy = TokenLogps(plain_model(saved(config, tmp_path)), 16, layout)
    with pytest.raises(ConfigError, match=config.model_type):
        probe.check_segments(policy, "here")


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
