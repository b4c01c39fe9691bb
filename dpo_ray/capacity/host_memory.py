"""The memory of a node's processors that training workers and engines need, from which the sizes of pods follow.

On a node without GPUs everything is in this memory. On a node with GPUs, it holds what is offloaded, a copy of the state
while a checkpoint is written, and the processes themselves. The constants are assumptions; they are not measured on GPUs.
"""

from __future__ import annotations

from math import ceil

from dpo_ray.config.recipe import Recipe
from dpo_ray.config.train import STATE_BYTES

from .activations import Rows
from .memory import FLOAT32_BYTES, Setup, Weights, training_memory
from .model_sizes import ModelSizes
from .workload import Workload, micro_batches

GIB = 1 << 30
NODE_BYTES = 2 * GIB  # Ray's own processes on a node, and processes of workers that have no work
OBJECT_STORE_SHARE = 0.3  # Ray's default, of the memory of a node
PROCESS_BYTES = {"cpu": 1.5 * GIB, "cuda": 6 * GIB}  # libraries; on GPUs also CUDA's context and pinned buffers
READ_BYTES = 5 * GIB  # one file of weights while it is copied to a GPU; the export writes files of this size


def training_worker_bytes(recipe: Recipe, sizes: ModelSizes, workload: Workload, *, on_gpu: bool) -> float:
    """Return the bytes of a training worker in the memory of its node.

    If the model is a mixture of experts, each worker reads all weights once, and not only its own rows.
    """
    train = recipe.train
    batches = micro_batches(workload, train.groups_per_step, train.workers, train.tokens_per_micro_batch)
    rows = Rows.of(batches.tokens, workload.prompt_share, workload.completions, train.layout)
    shard = train.sharding.shard_workers or train.workers
    single = batches.is_single_for_sure
    v = _value_bytes(recipe, on_gpu)
    memory = training_memory(Setup(sizes, train, shard, v, rows, 1 if single else 2))
    trained = Weights.of(sizes, train).trained(sizes.layers)
    checkpoint = (FLOAT32_BYTES + STATE_BYTES[train.optimizer.type]) * trained / shard  # the copy that is written
    read = v * sizes.parameters if sizes.experts else 0
    held = memory.host_bytes + checkpoint + read
    return PROCESS_BYTES["cuda"] + held if on_gpu else PROCESS_BYTES["cpu"] + held + memory.peak.total


def export_bytes(recipe: Recipe, sizes: ModelSizes, *, on_gpu: bool) -> float:
    """Return the bytes of the trained weights, which one worker gathers in the memory of its node to export them."""
    lora = recipe.train.lora
    if lora is not None and not lora.merge:
        return FLOAT32_BYTES * Weights.of(sizes, recipe.train).trained(sizes.layers)
    return _value_bytes(recipe, on_gpu) * sizes.parameters


def engine_bytes(recipe: Recipe, sizes: ModelSizes, *, on_gpu: bool) -> float:
    """Return the bytes of an engine in the memory of its node: on CPUs weights, a step, logits and KV cache."""
    from dpo_ray.reference.scorer import ScorerSettings
    from dpo_ray.reference.vllm.engine import EngineFacts, kv_cache_bytes, logits_bytes_per_row, most_step_tokens

    reference, v, longest = recipe.reference, _value_bytes(recipe, on_gpu), recipe.data.max_length_tokens
    if on_gpu:
        return reference.tensor_parallel * PROCESS_BYTES["cuda"] + READ_BYTES
    kv_values = 2 * sizes.layers * sizes.kv_width
    facts = EngineFacts(sizes.vocabulary, v, kv_values, False, reference.tensor_parallel, 0)
    dtype = "float32" if v == FLOAT32_BYTES else "bfloat16"
    settings = ScorerSettings("vllm", "", dtype, "cpu", longest, None, 0.0, share_prompt=True)
    step = reference.max_batched_tokens or most_step_tokens(facts, settings)
    wide = sizes.intermediate * max(1, sizes.experts_per_token)
    work = v * step * (2 * sizes.hidden + 3 * wide) + logits_bytes_per_row(facts) * min(step, longest)
    return PROCESS_BYTES["cpu"] + v * sizes.parameters + work + kv_cache_bytes(facts, longest, step)


def node_gib(workers_bytes: float) -> int:
    """Return the memory in GiB of a node on which workers with this memory run together."""
    return ceil((NODE_BYTES + workers_bytes) / (1 - OBJECT_STORE_SHARE) / GIB)


def _value_bytes(recipe: Recipe, on_gpu: bool) -> int:
    """Return the bytes of a number in the forward pass. By default that is float32 on CPUs, and bfloat16 on GPUs."""
    dtype = recipe.model.dtype
    return 4 if dtype == "float32" or (dtype == "auto" and not on_gpu) else 2
