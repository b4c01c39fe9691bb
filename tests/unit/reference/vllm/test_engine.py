"""The sizes of an engine: numbers worked out by hand, and that logits fit in what is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import ConfigError
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.vllm.engine import (
    EngineFacts,
    can_load,
    kv_cache_bytes,
    logits_bytes_per_row,
    logits_room_bytes,
    step_tokens,
)

GIB = 1 << 30
# A Llama of 8 billion parameters: 32 layers, 8 heads of keys and of values, 128 wide.
LLAMA = EngineFacts(128_256, 2, 2 * 32 * 8 * 128, v2_runner=False, tensor_parallel=1, device_bytes=80 * GIB)
GEMMA = replace(LLAMA, vocabulary=262_144)


def settings(longest: int, fraction: float = 0.85, device: str = "cuda") -> ScorerSettings:
    return ScorerSettings("vllm", "model", "bfloat16", device, longest, None, fraction, True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (LLAMA, 128_256 * (2 + 4 + 4)),
        (replace(LLAMA, value_bytes=4), 128_256 * (4 + 4 + 4)),
        (replace(LLAMA, tensor_parallel=2), 128_256 * (2 + 2 + 4 + 4)),
        (replace(LLAMA, v2_runner=True), 128_256 * (2 + 2)),
        (replace(LLAMA, v2_runner=True, tensor_parallel=8), 128_256 * (2 + 2 + 2)),
    ],
)
def test_bytes_of_a_row_of_logits(facts: EngineFacts, expected: int) -> None:
    assert logits_bytes_per_row(facts) == expected


@pytest.mark.parametrize(
    ("facts", "asked", "expected"),
    [
        # 80 GiB * 0.15 * 0.75 = 9 GiB hold 7534 rows of 1,282,560 bytes.
        (LLAMA, settings(4096), 16384),  # a sequence's rows fit, and a step is of as many sequences as it likes
        (LLAMA, settings(7534), 16384),
        (LLAMA, settings(7535), 7488),  # 7534, down to a multiple of 64: a long sequence goes by chunks
        (LLAMA, settings(131_072), 7488),
        (GEMMA, settings(8192), 3648),  # 3686 rows
        (replace(GEMMA, v2_runner=True), settings(131_072), 16384),  # 1024 rows are 1 GiB
        (replace(LLAMA, device_bytes=24 * GIB), settings(2048), 8192),  # 2.7 GiB hold 2260
        (replace(LLAMA, device_bytes=24 * GIB), settings(4096), 2240),
        (LLAMA, settings(4096, fraction=0.3), 16384),  # the rest of the GPU may be another engine's
        (LLAMA, settings(8192, fraction=0.3), 7488),
        # On CPU, 16 GiB / 16 = 1 GiB holds 837 rows.
        (replace(LLAMA, device_bytes=16 * GIB), settings(512, device="cpu"), 4096),
        (replace(LLAMA, device_bytes=16 * GIB), settings(2048, device="cpu"), 832),
    ],
)
def test_tokens_of_a_step(facts: EngineFacts, asked: ScorerSettings, expected: int) -> None:
    assert step_tokens(facts, asked) == expected


def test_too_little_room_is_said_before_the_engine_dies_of_it() -> None:
    with pytest.raises(ConfigError, match="logits of 256 tokens do not fit") as error:
        step_tokens(replace(LLAMA, device_bytes=24 * GIB), settings(4096, fraction=0.99))
    assert error.value.where == "reference.gpu_memory_fraction=0.99"
    with pytest.raises(ConfigError):
        step_tokens(LLAMA, settings(64, fraction=1.0))


@given(
    vocabulary=st.integers(1000, 300_000),
    value_bytes=st.sampled_from([2, 4]),
    v2_runner=st.booleans(),
    tensor_parallel=st.sampled_from([1, 2, 8]),
    gib=st.integers(4, 200),
    longest=st.integers(2, 200_000),
    fraction=st.floats(0.05, 1),
)
def test_the_largest_rows_of_a_step_always_fit(
    vocabulary, value_bytes, v2_runner, tensor_parallel, gib, longest, fraction
) -> None:
    facts = EngineFacts(vocabulary, value_bytes, 1, v2_runner, tensor_parallel, gib * GIB)
    asked = settings(longest, fraction)
    try:
        step = step_tokens(facts, asked)
    except ConfigError:
        assert min(256, longest) * logits_bytes_per_row(facts) > logits_room_bytes(facts, asked)
        return
    rows = min(step, longest, 1024 if v2_runner else step)
    assert rows * logits_bytes_per_row(facts) <= gib * GIB * (1 - fraction)
    assert step >= 256


def test_the_cache_on_cpu_holds_four_steps_and_some_full_sequences() -> None:
    """131,072 bytes a token; 4 * 4096 + 8 * (2048 + 1 + 32) tokens."""
    assert kv_cache_bytes(LLAMA, 2048, 4096) == 33_032 * 131_072
    assert kv_cache_bytes(replace(LLAMA, kv_values_per_token=16), 2048, 4096) == 256 << 20


def test_a_living_engine_takes_other_weights_and_nothing_else() -> None:
    started = settings(128, device="cpu")
    other = replace(started, model_dir="round-2")
    assert can_load(started, started, other)
    assert can_load(started, other, started)
    assert not can_load(started, started, replace(other, max_length_tokens=129))
    assert not can_load(started, started, replace(started, adapter_dir="adapter"))  # started without room for one
    with_room = replace(started, adapter_dir="adapter")
    assert can_load(with_room, with_room, started)  # the adapter off: the base alone
    assert not can_load(with_room, with_room, replace(other, adapter_dir=None))  # its base stays
