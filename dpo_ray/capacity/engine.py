"""The GPU memory of a vLLM engine: the weights, the logits of prompts, and the remaining memory for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.errors import ConfigError

from .hardware import Gpu
from .model_sizes import ModelSizes

BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class EngineMemory:
    """The memory on each GPU of one engine, in bytes. `problem` says why the engine does not fit; empty: it fits."""

    weights: float
    step: float  # the activations of a step of `step_tokens`
    logits: float  # the logits of prompts, which are not part of the memory that vLLM reserves
    kv_cache: float
    kv_tokens: int
    step_tokens: int
    problem: str


def engine_memory(
    sizes: ModelSizes, config: ReferenceConfig, gpu: Gpu, max_length_tokens: int, value_bytes: int
) -> EngineMemory:
    """Divide a GPU's memory as vLLM does: `gpu_memory_fraction` of it holds weights, step data and KV cache.

    The code of the scorer (`reference/vllm/engine.py`) chooses the number of tokens in a step. vLLM has two model
    runners; the estimate is for the one that needs more memory.
    """
    from dpo_ray.reference.scorer import ScorerSettings
    from dpo_ray.reference.vllm.engine import EngineFacts, logits_bytes_per_row, step_tokens

    tp = config.tensor_parallel
    kv_heads = max(1, sizes.kv_heads // tp)  # if there are fewer heads than GPUs, they are replicated
    kv_values = 2 * sizes.layers * kv_heads * sizes.head_dim
    facts = EngineFacts(sizes.vocabulary, value_bytes, kv_values, False, tp, gpu.memory_bytes)
    settings = ScorerSettings(
        "vllm",
        "",
        "float32" if value_bytes > BFLOAT16_BYTES else "bfloat16",
        "cuda",
        max_length_tokens,
        config.max_batched_tokens,
        config.gpu_memory_fraction,
        config.share_prompt,
        tp,
    )
    problem = ""
    try:
        tokens = config.max_batched_tokens or step_tokens(facts, settings)
    except ConfigError as error:
        tokens, problem = 256, error.what
    weights = value_bytes * sizes.parameters / tp
    # At its peak a block holds the residual twice, and gate and up of the feed-forward part, split over the GPUs.
    wide = sizes.intermediate * max(1, sizes.experts_per_token) / tp
    step = value_bytes * tokens * (2 * sizes.hidden + 3 * wide)
    room = gpu.memory_bytes * config.gpu_memory_fraction - weights - step
    kv_tokens = max(0, int(room / (kv_values * value_bytes)))
    if not problem and kv_tokens < max_length_tokens + 1:
        limit = f"{config.gpu_memory_fraction:.0%} of {gpu.memory_bytes / 1e9:.0f} GB"
        problem = f"weights of {weights / 1e9:.1f} GB leave too little of {limit} for the KV cache of one sequence"
    logits = logits_bytes_per_row(facts) * min(tokens, max_length_tokens)
    return EngineMemory(weights, step, logits, max(0.0, room), kv_tokens, tokens, problem)
