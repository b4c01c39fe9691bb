"""The memory of machines, not of GPUs, that a training worker and an engine are expected to need."""

from __future__ import annotations

from dpo_ray.config.recipe import Recipe

from .activations import Rows
from .memory import Setup, training_memory
from .model_sizes import ModelSizes
from .workload import Workload, micro_batches

# Python with torch, and for an engine with vLLM, before there is a model: an assumption from processes seen on CPUs.
WORKER_BYTES, ENGINE_BYTES = 1.0e9, 2.0e9
STEP_TOKENS = 4096  # of an engine on CPUs, if the recipe does not set it (`reference/vllm/engine.py`)


def worker_host_bytes(
    recipe: Recipe, sizes: ModelSizes, workload: Workload, value_bytes: int, *, on_gpu: bool
) -> float:
    """Return the machine's memory that one training worker needs at its peak.

    On CPUs this is the memory of the whole step. On a GPU it is what the worker keeps in the machine's memory.
    """
    train = recipe.train
    shard = train.sharding.shard_workers or train.workers
    batches = micro_batches(workload, train.groups_per_step, train.workers, train.tokens_per_micro_batch)
    rows = Rows.of(batches.tokens, workload.prompt_share, workload.completions, train.layout)
    memory = training_memory(Setup(sizes, train, shard, value_bytes, rows, 1 if batches.is_single_for_sure else 2))
    return WORKER_BYTES + memory.host_bytes + (0.0 if on_gpu else memory.peak.total)


def engine_host_bytes(recipe: Recipe, sizes: ModelSizes, value_bytes: int, *, on_gpu: bool) -> float:
    """Return the machine's memory that one engine needs at its peak; on CPUs the model and its caches are in it."""
    from dpo_ray.reference.vllm.engine import EngineFacts, kv_cache_bytes, logits_bytes_per_row

    if on_gpu:
        return ENGINE_BYTES
    longest, kv_values = recipe.data.max_length_tokens, 2 * sizes.layers * sizes.kv_heads * sizes.head_dim
    facts = EngineFacts(sizes.vocabulary, value_bytes, kv_values, False, 1, 0)
    step = recipe.reference.max_batched_tokens or STEP_TOKENS
    logits = logits_bytes_per_row(facts) * min(step, longest)
    return ENGINE_BYTES + value_bytes * sizes.parameters + kv_cache_bytes(facts, longest, step) + logits
