"""The placement of training and engines on a cluster: whether they fit and, if they do not, why."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray.config.objective import uses_reference
from dpo_ray.config.recipe import Recipe

from .activations import Rows
from .engine import EngineMemory, engine_memory
from .hardware import Cluster
from .memory import FLOAT32_BYTES, RankMemory, Setup, Weights, training_memory
from .model_sizes import ModelSizes
from .workload import MicroBatches, Workload, micro_batches

# The CUDA context and the communicators' buffers are not part of this model, and free memory is fragmented. This is
# an assumption, in addition to counting a GB of a GPU's memory as 10^9 bytes.
RESERVED_BYTES, RESERVED_SHARE = 1.5e9, 0.04


@dataclass(frozen=True)
class Training:
    """How training is placed on the cluster: its workers and micro-batches, and the memory of one rank."""

    workers: int
    shard_ranks: int
    batches: MicroBatches
    memory: RankMemory
    room_bytes: float  # the memory of a GPU that training can use

    @property
    def fits(self) -> bool:
        return self.memory.peak.total <= self.room_bytes


def value_bytes(recipe: Recipe) -> int:
    return 4 if recipe.model.dtype == "float32" else 2


def gpus_beside(recipe: Recipe) -> int:
    """Return the number of GPUs that engines use while the policy trains."""
    if recipe.reference.mode == "streaming" or recipe.online is not None:
        return recipe.reference.replicas * recipe.reference.tensor_parallel
    return 0


def training_on(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster) -> Training:
    """Place training on the cluster with the recipe's workers or, if it has too few GPUs, one worker per GPU."""
    free = max(1, cluster.gpus - gpus_beside(recipe))
    workers = min(recipe.train.workers, free)
    shard = recipe.train.sharding.shard_workers or workers
    if workers % shard:  # on a smaller cluster: a single copy of the weights
        shard = workers
    t = recipe.train
    batches = micro_batches(workload, t.groups_per_step, workers, t.tokens_per_micro_batch)
    rows = Rows.of(batches.tokens, workload.prompt_share, workload.completions, t.layout)
    memory = training_memory(Setup(sizes, t, shard, value_bytes(recipe), rows, 1 if batches.is_single_for_sure else 2))
    room = cluster.gpu.memory_bytes * (1 - RESERVED_SHARE) - RESERVED_BYTES
    return Training(workers, shard, batches, memory, room)


def engine_on(recipe: Recipe, sizes: ModelSizes, cluster: Cluster) -> EngineMemory | None:
    scores = uses_reference(recipe.train.objective) and recipe.reference.engine == "vllm"
    if not scores and not recipe.evaluate.sample_prompts and recipe.online is None:
        return None
    return engine_memory(sizes, recipe.reference, cluster.gpu, recipe.data.max_length_tokens, value_bytes(recipe))


def problems_of(
    recipe: Recipe, sizes: ModelSizes, cluster: Cluster, training: Training, engine: EngineMemory | None
) -> tuple[str, ...]:
    problems = []
    if not training.fits:
        problems.append(
            f"training needs {training.memory.peak.total / 1e9:.1f} GB on each of {training.workers} GPUs, which have "
            f"{training.room_bytes / 1e9:.1f} GB for it"
        )
        problems += _reasons(recipe, sizes, training)
    if engine is not None and engine.problem:
        problems.append(f"an engine of {recipe.reference.tensor_parallel} GPUs does not fit: {engine.problem}")
    if engine is not None and recipe.reference.tensor_parallel > cluster.gpus_per_node:
        problems.append(
            f"reference.tensor_parallel={recipe.reference.tensor_parallel}, but a node has {cluster.gpus_per_node} GPUs"
        )
    if gpus_beside(recipe) >= cluster.gpus:
        problems.append(
            f"engines hold {gpus_beside(recipe)} GPUs while training runs, and the cluster has {cluster.gpus}"
        )
    return tuple(problems)


def _reasons(recipe: Recipe, sizes: ModelSizes, training: Training) -> list[str]:
    """List the uses of a rank's memory, such as gradients, that take more than a third of the available memory.

    If no use takes so much, list all uses.
    """
    peak, third = training.memory.peak, training.room_bytes / 3
    trained = Weights.of(sizes, recipe.train).trained(sizes.layers)
    state = peak.weights + peak.optimizer
    if not recipe.train.sharding.cpu_offload:
        state += FLOAT32_BYTES * trained / training.shard_ranks
    work = peak.activations + peak.logits + peak.work
    parts = {
        f"weights, gradients and optimizer state, sharded over {training.shard_ranks} ranks": state,
        "whole float32 gradients on every rank, as a step has more than one micro-batch per rank": peak.whole_gradients,
        f"activations and the block being computed for {training.batches.tokens:,} tokens": work,
        "weights gathered for the forward pass": peak.gathered,
    }
    large = {what: value for what, value in parts.items() if value > third} or parts
    return [f"{value / 1e9:.1f} GB are {what}" for what, value in large.items()]


def remarks_of(recipe: Recipe, cluster: Cluster, training: Training) -> tuple[str, ...]:
    remarks, free = [], cluster.gpus - gpus_beside(recipe)
    if recipe.train.workers > training.workers:
        remarks.append(
            f"the recipe sets train.workers={recipe.train.workers}; this plan uses {training.workers}, as there are no more GPUs"
        )
    elif free > training.workers:
        remarks.append(
            f"{training.workers} of {free} GPUs train; train.workers={free} would use all of them, with the same result"
        )
    if recipe.train.sharding.shard_workers not in (None, training.shard_ranks):
        remarks.append(
            f"this plan uses shard_workers={training.shard_ranks}, as the recipe's value does not divide the number of workers"
        )
    batches = training.batches
    if batches.is_single_for_sure:
        remarks.append("one micro-batch per rank and step, whatever the lengths: no rank ever holds whole gradients")
    else:
        remarks.append(
            f"a step may have more than one micro-batch per rank (for mean lengths: {batches.usual}); every rank then holds whole float32 "
            f"gradients, {FLOAT32_BYTES} bytes per trained parameter, which are counted here"
        )
    return tuple(remarks)
