"""The planner's memory of a training rank against what PyTorch's tracker counts of the project's own step, within 10 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig, Qwen2Config

from dpo_ray.capacity.activations import Rows
from dpo_ray.capacity.memory import RankMemory, Setup, training_memory
from dpo_ray.capacity.model_sizes import KNOWN, sizes_of_config
from dpo_ray.config.train import TrainConfig
from dpo_ray.models.work import ModelShape
from dpo_ray.run.tiny import FAMILIES, family_config
from tests.unit.capacity.measured_memory import measured_bytes, micro_batch

TOLERANCE = 0.10
NEGLIGIBLE = 0.02  # of the total: smaller categories are not compared by themselves

LLAMA = LlamaConfig(  # grouped queries
    vocab_size=32000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4
)  # fmt: skip
QWEN = Qwen2Config(  # tied embeddings, biases, a large vocabulary
    vocab_size=65536, hidden_size=768, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip
PHI = Phi3Config(  # no grouped queries, fused projections
    vocab_size=32064, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16,
    pad_token_id=0,
)  # fmt: skip
SMALL_VOCABULARY = LlamaConfig(  # blocks, not the head, decide
    vocab_size=4096, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4
)  # fmt: skip
ZEPHYR = MistralConfig(  # Mistral 7B itself
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)  # fmt: skip


def compared(
    config: PreTrainedConfig,
    ranks: int = 4,
    micro_batches: int = 1,
    groups: int = 8,
    prompt: int = 128,
    completion: int = 192,
    dtype: torch.dtype = torch.bfloat16,
    **train: Any,
) -> tuple[dict[str, int], dict[str, float], RankMemory]:
    """Measure and plan a step; returns both by category, and the plan."""
    settings = TrainConfig(logprob_chunk_tokens=512, **train)
    batches = [micro_batch(groups, prompt, completion)] * micro_batches
    measured = measured_bytes(config, settings, ranks, batches, dtype)
    rows = Rows(groups * (prompt + 2 * completion), groups * (3 * prompt + 2 * completion), groups * 2 * completion)
    sizes = sizes_of_config(config.to_dict(), "a made model")
    shard_ranks = settings.sharding.shard_workers or ranks
    planned = training_memory(Setup(sizes, settings, shard_ranks, dtype.itemsize, rows, micro_batches))
    p = planned.peak
    by_category = {
        "weights": p.weights,
        "optimizer": p.optimizer,
        "gathered": p.gathered,
        "kept": p.activations + p.logits,
        "gradients and work": p.gradients + p.whole_gradients + p.work,
        "total": p.total,
    }
    return measured, by_category, planned


def assert_agree(measured: dict[str, int], planned: dict[str, float]) -> None:
    for name, value in measured.items():
        if value > NEGLIGIBLE * measured["total"]:
            assert planned[name] == pytest.approx(value, rel=TOLERANCE), (name, measured, planned)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LLAMA, id="llama"),
        pytest.param(QWEN, id="qwen2", marks=pytest.mark.slow),
        pytest.param(PHI, id="phi3", marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_is_planned(config: PreTrainedConfig, checkpointing: str) -> None:
    measured, planned, _ = compared(config, activation_checkpointing=checkpointing)
    assert_agree(measured, planned)


@pytest.mark.slow
def test_selective_checkpointing_where_a_block_decides() -> None:
    measured, planned, memory = compared(SMALL_VOCABULARY, activation_checkpointing="selective")
    assert "block" in memory.moment
    assert_agree(measured, planned)


@pytest.mark.slow
def test_a_second_micro_batch_adds_the_gradients_of_the_whole_model() -> None:
    measured, planned, memory = compared(LLAMA, micro_batches=2, activation_checkpointing="full")
    assert_agree(measured, planned)
    sizes = sizes_of_config(LLAMA.to_dict(), "")
    assert memory.peak.whole_gradients == 4 * (sizes.parameters - sizes.block_parameters)  # one is reduced by then
    alone = compared(LLAMA, activation_checkpointing="full")[0]
    assert measured["total"] - alone["total"] > 3 * sizes.parameters


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA, {"ranks": 8, "activation_checkpointing": "none", "micro_batches": 3}),
        (LLAMA, {"activation_checkpointing": "full", "dtype": torch.float32}),
        (LLAMA, {"activation_checkpointing": "full", "lora": {"rank": 16}}),
        (SMALL_VOCABULARY, {"activation_checkpointing": "selective", "lora": {"rank": 16}}),
        (SMALL_VOCABULARY, {"activation_checkpointing": "none", "lora": {"rank": 16, "dropout": 0.1}}),
        (QWEN, {"activation_checkpointing": "full", "optimizer": {"type": "rmsprop"}}),
        (PHI, {"activation_checkpointing": "full", "micro_batches": 2, "groups": 1}),
        (LLAMA, {"ranks": 8, "workers": 8, "sharding": {"mode": "hybrid", "shard_workers": 4}}),
    ],
    ids=["three-micro-batches", "float32", "lora", "lora-selective", "lora-dropout", "rmsprop", "few-tokens", "hybrid"],
)
def test_other_settings_take_in_all_what_is_planned(config: PreTrainedConfig, options: dict[str, Any]) -> None:
    measured, planned, _ = compared(config, **options)
    assert planned["total"] == pytest.approx(measured["total"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.long), 2])
def test_mistral_7b_on_eight_ranks_takes_what_is_planned(micro_batches: int) -> None:
    measured, planned, _ = compared(
        ZEPHYR, 8, micro_batches, groups=16, prompt=200, completion=400, activation_checkpointing="full"
    )
    assert_agree(measured, planned)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    config = family_config(family, 500, 0, 1, 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes, shape = sizes_of_config(config.to_dict(), family), ModelShape.of(model)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.layers * sizes.block_matrices == shape.trained_weights
    assert sizes.head_parameters == shape.head_weights
    assert sizes.layers * sizes.query_width == shape.attention_width


@pytest.mark.parametrize(
    ("name", "billions"),  # as the model cards say
    [
        ("Llama 3 70B", 70.6),
        ("Llama 3 8B", 8.03),
        ("Llama 3.1 405B", 405.9),
        ("Llama 3.2 3B", 3.21),
        ("Llama 3.2 1B", 1.24),
        ("Mistral 7B", 7.24),
        ("Mixtral 8x7B", 46.7),
        ("Qwen 2.5 0.5B", 0.49),
        ("Qwen 2.5 1.5B", 1.54),
        ("Qwen 2.5 7B", 7.62),
        ("Qwen 2.5 32B", 32.8),
        ("Qwen 2.5 72B", 72.7),
        ("Qwen 3 8B", 8.2),
        ("Phi-3 mini", 3.82),
    ],
)
def test_known_models_have_as_many_parameters_as_their_cards_say(name: str, billions: float) -> None:
    sizes = next(sizes for _, sizes in KNOWN if sizes.name == name)
    assert sizes.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def of_mistral(**train: Any) -> RankMemory:
    sizes = next(sizes for _, sizes in KNOWN if sizes.name == "Mistral 7B")
    rows = Rows(4096, 6144, 3072)
    return training_memory(Setup(sizes, TrainConfig(activation_checkpointing="full", **train), 8, 2, rows, 1))


@pytest.mark.parametrize(
    ("optimizer", "on_gpu", "on_host"),  # bytes a parameter
    [("adamw", 8, 0), ("rmsprop", 4, 0), ("adamw_8bit", 2.03, 0), ("paged_adamw", 0, 8), ("adafactor", 0, 0)],
)
def test_optimizers_keep_what_they_are_known_for(optimizer: str, on_gpu: float, on_host: float) -> None:
    found, parameters = of_mistral(optimizer={"type": optimizer}), 7.24e9 / 8
    assert found.peak.optimizer == pytest.approx(on_gpu * parameters, rel=0.01)
    assert found.host_bytes == pytest.approx(on_host * parameters, rel=0.01)


def test_offloaded_shards_are_in_the_memory_of_the_cpu() -> None:
    found = of_mistral(sharding={"cpu_offload": True})
    assert (found.peak.weights, found.peak.optimizer, found.peak.gradients) == (0, 0, 0)
    assert found.host_bytes == pytest.approx(16 * 7.24e9 / 8, rel=0.01)


def test_quantized_blocks_are_whole_on_every_rank_at_half_a_byte() -> None:
    found = of_mistral(lora={"rank": 16}, quantization="nf4")
    assert found.peak.weights == pytest.approx(0.516 * 6.98e9 + 4 * (0.262e9 + 0.042e9) / 8, rel=0.01)
    assert found.peak.total < of_mistral(lora={"rank": 16}).peak.total + 1e9
