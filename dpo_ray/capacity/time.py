"""The time and network traffic of a run's stages, by a roofline model.

A stage takes the longer of two times: its operations divided by the GPUs' peak speed, and its bytes divided by the
bandwidth. The constants below say which share of the peak and of the bandwidth is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from dpo_ray.config.recipe import Recipe

from .hardware import Cluster
from .memory import FLOAT32_BYTES, Weights
from .model_sizes import ModelSizes
from .workload import Workload

# Shares of the values in a data sheet. Training: torchtitan reports 33 to 39 % of the peak for Llama 3.1 8B on H100s in
# bf16 (github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md). The others are assumptions: scoring
# computes the same products without a backward pass or gathering, and sampling reads all weights for every token.
TRAINING_EFFICIENCY, SCORING_EFFICIENCY = 0.35, 0.40
BANDWIDTH_EFFICIENCY = 0.6  # of memory during sampling, and of links and networks in collectives
SEQUENCES_PER_ENGINE = 256  # sequences that are sampled at the same time (`reference/vllm/engine.py`)
ASSUMED_HELDOUT_GROUPS = 2000


@dataclass(frozen=True)
class StageTime:
    """The floating-point operations of one stage, on all GPUs together, and how long they take."""

    stage: str
    flops: float
    seconds: float
    bound: str  # what limits the speed


@dataclass(frozen=True)
class Traffic:
    """The bytes that one rank receives for one optimizer step."""

    gathered: float  # weights
    reduced: float  # gradients, among the ranks that share a copy
    replicated: float  # gradients, between copies
    seconds: float


def group_flops(sizes: ModelSizes, workload: Workload, recipe: Recipe) -> float:
    """Count the operations to train on one preference group of mean size, as the metric `mfu` does (`models/work.py`)."""
    from dpo_ray.models.work import ModelShape

    weights = Weights.of(sizes, recipe.train)
    matrices = sizes.layers * sizes.active_block_matrices
    frozen = matrices if recipe.train.lora is not None else 0
    trained = sizes.layers * weights.block_trained if frozen else matrices
    shape = ModelShape(frozen, trained, sizes.head_parameters, not frozen, sizes.query_width * sizes.layers)
    completions = [round(workload.completion_tokens)] * max(1, round(workload.completions))
    return shape.flops(round(workload.prompt_tokens), completions)


def forward_flops(sizes: ModelSizes, workload: Workload) -> float:
    """Count the operations to compute the log-probs of one preference group of mean size.

    The prompt is computed once for all completions, and logits are computed for every token.
    """
    seen = workload.prompt_tokens**2 / 2 + workload.completions * workload.completion_tokens * (
        workload.prompt_tokens + workload.completion_tokens / 2
    )
    products = 2 * (sizes.layers * sizes.active_block_matrices + sizes.head_parameters) * workload.group_tokens
    return products + 4 * sizes.query_width * sizes.layers * seen


def traffic(
    sizes: ModelSizes,
    recipe: Recipe,
    cluster: Cluster,
    workers: int,
    shard_ranks: int,
    micro_batches: int,
    value_bytes: int,
) -> Traffic:
    """Compute what FSDP2 sends: weights twice per micro-batch (forward, backward), gradients once per step.

    In an all-gather or a reduce-scatter over R ranks, a rank receives (R - 1)/R of all data; in an all-reduce, twice as
    much. Within a node, this traffic uses the links between GPUs. Across nodes, the traffic can use the whole network
    of a node, because a node receives the data of the other nodes only once. Traffic between copies of the model is
    different for each rank, so each rank has only its share of the network.
    """
    weights = Weights.of(sizes, recipe.train)
    blocks, trained = sizes.layers * weights.block, weights.trained(sizes.layers)
    others, copies = (shard_ranks - 1) / shard_ranks, workers // shard_ranks
    gathered = value_bytes * micro_batches * (2 * blocks + weights.root) * others
    reduced = FLOAT32_BYTES * trained * others
    replicated = 2 * FLOAT32_BYTES * trained / shard_ranks * (copies - 1) / copies
    gpu, node = cluster.gpu, cluster.gpus_per_node
    inside = gpu.link_bytes_per_second
    across = min(inside, node * gpu.network_bytes_per_second)
    between = inside if workers <= node else gpu.network_bytes_per_second
    sharing = inside if shard_ranks <= node else across
    seconds = ((gathered + reduced) / sharing + replicated / between) / BANDWIDTH_EFFICIENCY
    return Traffic(gathered, reduced, replicated, seconds)


def training_time(
    sizes: ModelSizes, recipe: Recipe, workload: Workload, cluster: Cluster, workers: int, steps: int, sent: Traffic
) -> StageTime:
    """Estimate the time of training. FSDP2 sends while it computes, so a step takes the longer of the two times.

    Full activation checkpointing adds a forward pass of the blocks. A layout other than `shared` computes a prompt
    again for each completion.
    """
    t = recipe.train
    useful = group_flops(sizes, workload, recipe) * t.groups_per_step
    done = useful * (4 / 3 if t.activation_checkpointing == "full" else 1)
    if t.layout != "shared":
        done *= workload.completions * workload.sequence_tokens / workload.group_tokens
    computing = done / (workers * cluster.gpu.bf16_flops * TRAINING_EFFICIENCY)
    bound = "computing" if computing >= sent.seconds else "the network"
    return StageTime("train", useful * steps, max(computing, sent.seconds) * steps, bound)


def scoring_time(sizes: ModelSizes, workload: Workload, groups: float, cluster: Cluster, gpus: int) -> StageTime:
    """Estimate the time to compute the reference model's log-probs of all preference groups."""
    flops = forward_flops(sizes, workload) * groups
    return StageTime("reference", flops, flops / (gpus * cluster.gpu.bf16_flops * SCORING_EFFICIENCY), "computing")


def sampling_time(
    sizes: ModelSizes,
    sequences: int,
    prompt_tokens: float,
    new_tokens: int,
    cluster: Cluster,
    engines: int,
    tp: int,
    v: int,
) -> StageTime:
    """Estimate the time of sampling. For each new token, an engine reads its weights once for a batch of sequences, and
    the KV cache of each sequence."""
    batch = max(1, min(SEQUENCES_PER_ENGINE, ceil(sequences / engines)))
    cache = v * 2 * sizes.layers * sizes.kv_width * (prompt_tokens + new_tokens / 2)
    gpu = cluster.gpu
    reading = (v * sizes.active_parameters + batch * cache) / (tp * gpu.memory_bytes_per_second * BANDWIDTH_EFFICIENCY)
    computing = 2 * sizes.active_parameters * batch / (tp * gpu.bf16_flops * SCORING_EFFICIENCY)
    turns = ceil(sequences / (batch * engines)) * new_tokens
    flops = 2 * sizes.active_parameters * float(sequences) * new_tokens
    bound = "memory bandwidth" if reading >= computing else "computing"
    return StageTime("sample", flops, turns * max(reading, computing), bound)
