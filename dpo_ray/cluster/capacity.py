"""What a recipe needs of a cluster, before anything is spent on it: memory, time, storage, and what to change where it does not fit.

Everything is worked out from the recipe, the model's sizes and the GPU's data sheet; nothing is started. How, with every
assumption and what was measured against it: docs/capacity.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dpo_ray.config.load import validate_recipe
from dpo_ray.config.objective import uses_reference
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError

from . import capacity_time as times
from .capacity_activations import Rows
from .capacity_engine import EngineMemory, engine_memory
from .capacity_hardware import Cluster
from .capacity_memory import FLOAT32_BYTES, STATE_BYTES, RankMemory, Setup, Weights, training_memory
from .capacity_model import ModelSizes
from .capacity_time import StageTime, Traffic
from .capacity_workload import MicroBatches, Workload, micro_batches, steps_of

# The CUDA context and the communicators' buffers are outside of what is followed here, and memory that is free is not all in one
# piece. An assumption, on top of a card's memory being read as 10^9 bytes a GB.
RESERVED_BYTES, RESERVED_SHARE = 1.5e9, 0.04
MOST_NODES = 1024


@dataclass(frozen=True)
class Training:
    """How training lies on the cluster."""

    workers: int
    shard_ranks: int
    batches: MicroBatches
    memory: RankMemory
    room_bytes: float  # of a GPU, for training

    @property
    def fits(self) -> bool:
        return self.memory.peak.total <= self.room_bytes


@dataclass(frozen=True)
class Change:
    """A change of the recipe, and the memory of a rank with it alone."""

    overrides: str
    total_bytes: float
    fits: bool
    remark: str = ""


@dataclass(frozen=True)
class StorageNeeds:
    """Bytes on the shared storage, without compression."""

    tokens: float
    reference: float
    schedule: float
    checkpoints: float
    policy: float


@dataclass(frozen=True)
class Capacity:
    """The answer."""

    recipe: Recipe
    cluster: Cluster
    sizes: ModelSizes
    trained_parameters: int
    workload: Workload
    steps: int
    training: Training
    engine: EngineMemory | None  # None: no stage has one
    problems: tuple[str, ...]  # why it does not fit; empty where it does
    remarks: tuple[str, ...]
    changes: tuple[Change, ...]
    nearest: Cluster | None  # the fewest nodes of this shape that fit, where this one does not
    stages: tuple[StageTime, ...]
    traffic: Traffic
    storage: StorageNeeds

    @property
    def fits(self) -> bool:
        return not self.problems


def work_out(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster) -> Capacity:
    """Work out what a recipe needs of a cluster of GPUs."""
    training = _training(recipe, sizes, workload, cluster)
    engine = _engine(recipe, sizes, cluster)
    problems = _problems(recipe, sizes, cluster, training, engine)
    trained = Weights.of(sizes, recipe.train).trained(sizes.layers)
    sent = times.traffic(
        sizes, recipe, cluster, training.workers, training.shard_ranks, training.batches.usual, _value_bytes(recipe)
    )
    steps = steps_of(recipe, workload.groups)
    return Capacity(
        recipe=recipe,
        cluster=cluster,
        sizes=sizes,
        trained_parameters=trained,
        workload=workload,
        steps=steps,
        training=training,
        engine=engine,
        problems=problems,
        remarks=_remarks(recipe, cluster, training),
        changes=() if training.fits else tuple(_changes(recipe, sizes, workload, cluster)),
        nearest=_nearest(recipe, sizes, workload, cluster) if problems else None,
        stages=_stages(recipe, sizes, workload, cluster, training, steps, sent),
        traffic=sent,
        storage=_storage(recipe, sizes, workload, steps, trained),
    )


def _value_bytes(recipe: Recipe) -> int:
    return 4 if recipe.model.dtype == "float32" else 2


def _gpus_beside(recipe: Recipe) -> int:
    """Count the GPUs that engines hold while the policy trains."""
    if recipe.reference.mode == "streaming" or recipe.online is not None:
        return recipe.reference.replicas * recipe.reference.tensor_parallel
    return 0


def _training(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster) -> Training:
    """Lay training on the cluster: the workers of the recipe, or as many as there are GPUs for."""
    free = max(1, cluster.gpus - _gpus_beside(recipe))
    workers = min(recipe.train.workers, free)
    shard = recipe.train.sharding.shard_workers or workers
    if workers % shard:  # of a smaller cluster: the copies that are left, or a single one
        shard = workers
    t = recipe.train
    batches = micro_batches(workload, t.groups_per_step, workers, t.tokens_per_micro_batch)
    rows = Rows.of(batches.tokens, workload.prompt_share, workload.completions, t.layout)
    memory = training_memory(Setup(sizes, t, shard, _value_bytes(recipe), rows, batches.most))
    room = cluster.gpu.memory_bytes * (1 - RESERVED_SHARE) - RESERVED_BYTES
    return Training(workers, shard, batches, memory, room)


def _engine(recipe: Recipe, sizes: ModelSizes, cluster: Cluster) -> EngineMemory | None:
    scores = uses_reference(recipe.train.objective) and recipe.reference.engine == "vllm"
    if not scores and not recipe.evaluate.sample_prompts and recipe.online is None:
        return None
    return engine_memory(sizes, recipe.reference, cluster.gpu, recipe.data.max_length_tokens, _value_bytes(recipe))


def _problems(
    recipe: Recipe, sizes: ModelSizes, cluster: Cluster, training: Training, engine: EngineMemory | None
) -> tuple[str, ...]:
    found = []
    if not training.fits:
        found.append(
            f"training needs {training.memory.peak.total / 1e9:.1f} GB on each of {training.workers} GPUs, which have "
            f"{training.room_bytes / 1e9:.1f} GB for it"
        )
        found += _reasons(recipe, sizes, training)
    if engine is not None and engine.problem:
        found.append(f"an engine of {recipe.reference.tensor_parallel} GPUs does not fit: {engine.problem}")
    if engine is not None and recipe.reference.tensor_parallel > cluster.gpus_per_node:
        found.append(
            f"reference.tensor_parallel={recipe.reference.tensor_parallel}, and a node has {cluster.gpus_per_node} GPUs"
        )
    if _gpus_beside(recipe) >= cluster.gpus:
        found.append(f"engines hold {_gpus_beside(recipe)} GPUs beside training, and there are {cluster.gpus}")
    return tuple(found)


def _reasons(recipe: Recipe, sizes: ModelSizes, training: Training) -> list[str]:
    """Name what takes the memory: each part that is more than a third of the room, or all where none is."""
    peak, third = training.memory.peak, training.room_bytes / 3
    trained = Weights.of(sizes, recipe.train).trained(sizes.layers)
    state = peak.weights + peak.optimizer
    if not recipe.train.sharding.cpu_offload:
        state += FLOAT32_BYTES * trained / training.shard_ranks
    work = peak.activations + peak.logits + peak.work
    parts = {
        f"weights, gradients and optimizer state, sharded over {training.shard_ranks} ranks": state,
        "whole float32 gradients on every rank, as a step has more than one micro-batch a rank": peak.whole_gradients,
        f"activations and work of {training.batches.tokens:,} tokens": work,
        "weights gathered for the forward pass": peak.gathered,
    }
    large = {what: value for what, value in parts.items() if value > third} or parts
    return [f"{value / 1e9:.1f} GB are {what}" for what, value in large.items()]


def _remarks(recipe: Recipe, cluster: Cluster, training: Training) -> tuple[str, ...]:
    remarks, free = [], cluster.gpus - _gpus_beside(recipe)
    if recipe.train.workers > training.workers:
        remarks.append(
            f"the recipe asks for train.workers={recipe.train.workers}; there are GPUs for {training.workers}, which this plan takes"
        )
    elif free > training.workers:
        remarks.append(
            f"{training.workers} of {free} GPUs train; train.workers={free} would use all, with the same result"
        )
    if recipe.train.sharding.shard_workers not in (None, training.shard_ranks):
        remarks.append(
            f"shard_workers={training.shard_ranks} is planned with, as that of the recipe does not divide the workers"
        )
    batches = training.batches
    if batches.is_single_for_sure:
        remarks.append("one micro-batch a rank and step, whatever the lengths: gradients are never held in whole")
    else:
        remarks.append(
            f"up to {batches.most} micro-batches a rank and step (usually {batches.usual}): with more than one, every rank holds whole "
            f"float32 gradients, {FLOAT32_BYTES} bytes a trained parameter; they are counted"
        )
    return tuple(remarks)


def _overridden(recipe: Recipe, **sections: dict[str, Any]) -> Recipe | None:
    """Replace values of `train`, and of `sharding` and `optimizer` in it; None where the recipe is then no valid one."""
    values = recipe.model_dump(mode="json")
    train = values["train"]
    train |= sections.get("train", {})
    train["sharding"] |= sections.get("sharding", {})
    train["optimizer"] |= sections.get("optimizer", {})
    try:
        return validate_recipe(values, where=recipe.name)
    except ConfigError:
        return None


def _changes(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster):
    """Yield changes in the order in which they are worth trying: first those that leave the result as it is."""
    t, now = recipe.train, _training(recipe, sizes, workload, cluster)
    free = max(1, cluster.gpus - _gpus_beside(recipe))

    def tried(overrides: str, remark: str = "", **sections: dict[str, Any]):
        if (other := _overridden(recipe, **sections)) is not None:
            found = _training(other, sizes, workload, cluster)
            yield Change(overrides, found.memory.peak.total, found.fits, remark)

    if t.activation_checkpointing != "full":
        yield from tried("train.activation_checkpointing=full", train={"activation_checkpointing": "full"})
    if t.sharding.mode == "hybrid" and now.shard_ranks < now.workers:
        yield from tried(
            "train.sharding.mode=full train.sharding.shard_workers=null",
            sharding={"mode": "full", "shard_workers": None},
        )
    if free > now.workers:
        yield from tried(f"train.workers={free}", train={"workers": free})
    smaller = max(workload.longest_group_tokens, t.tokens_per_micro_batch // 2)
    if smaller < now.batches.tokens:
        yield from tried(f"train.tokens_per_micro_batch={smaller}", train={"tokens_per_micro_batch": smaller})
    if not now.batches.is_single_for_sure:
        larger = -(-t.groups_per_step // now.workers) * workload.longest_group_tokens
        yield from tried(
            f"train.tokens_per_micro_batch={larger}", "one micro-batch a rank", train={"tokens_per_micro_batch": larger}
        )
        if t.groups_per_step > now.workers:
            yield from tried(
                f"train.groups_per_step={now.workers}",
                "one micro-batch a rank, and another batch: the learning rate may need a change",
                train={"groups_per_step": now.workers},
            )
    if t.optimizer.type == "adamw":
        yield from tried("train.optimizer.type=adamw_8bit", optimizer={"type": "adamw_8bit"})
    if t.lora is None:
        yield from tried("train.lora.rank=16", "an adapter is trained, not all weights", train={"lora": {"rank": 16}})
    if not t.sharding.cpu_offload and t.quantization is None:
        yield from tried("train.sharding.cpu_offload=true", "slow", sharding={"cpu_offload": True})


def _nearest(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster) -> Cluster | None:
    """Find the fewest nodes of this shape on which the recipe fits, all of them training."""

    def fits(nodes: int) -> bool:
        other = replace(cluster, nodes=nodes)
        workers = other.gpus - _gpus_beside(recipe)
        if workers < 1:
            return False
        shard = recipe.train.sharding.shard_workers
        sharding = {} if shard is None or workers % shard == 0 else {"mode": "full", "shard_workers": None}
        changed = _overridden(recipe, train={"workers": workers}, sharding=sharding)
        if changed is None:
            return False
        training = _training(changed, sizes, workload, other)
        return not _problems(changed, sizes, other, training, _engine(changed, sizes, other))

    return _first(fits, cluster)


def _first(fits: Callable[[int], bool], cluster: Cluster) -> Cluster | None:
    """Try one node after another up to 64, then doublings: memory does not fall evenly, as micro-batches are whole."""
    tried = [*range(1, 65), *(2**i for i in range(7, MOST_NODES.bit_length()))]
    return next((replace(cluster, nodes=n) for n in tried if fits(n)), None)


def _stages(
    recipe: Recipe,
    sizes: ModelSizes,
    workload: Workload,
    cluster: Cluster,
    training: Training,
    steps: int,
    sent: Traffic,
) -> tuple[StageTime, ...]:
    stages, reference = [], recipe.reference
    engines = max(1, min(reference.replicas, cluster.gpus // reference.tensor_parallel))
    gpus = engines * reference.tensor_parallel if reference.engine == "vllm" else training.workers
    groups, rounds, v = float(workload.groups), 1, _value_bytes(recipe)
    if recipe.online is not None:
        rounds, groups = recipe.online.rounds, float(recipe.online.prompts_per_round)
        steps = max(1, round(groups / recipe.train.groups_per_step)) * recipe.train.epochs
        sampling = recipe.online.sampling
        sequences = recipe.online.prompts_per_round * sampling.samples_per_prompt
        stages.append(
            times.sampling_time(
                *(sizes, sequences, workload.prompt_tokens, sampling.max_new_tokens),
                *(cluster, engines, reference.tensor_parallel, v),
            )
        )
    if uses_reference(recipe.train.objective):
        stages.append(times.scoring_time(sizes, workload, groups, cluster, gpus))
    stages.append(times.training_time(sizes, recipe, workload, cluster, training.workers, steps, sent))
    stages = [replace(s, flops=s.flops * rounds, seconds=s.seconds * rounds) for s in stages]
    if recipe.data.eval:
        passes = 1 + (steps // recipe.train.eval_every_steps if recipe.train.eval_every_steps else 0)
        heldout = times.scoring_time(
            sizes, workload, float(times.ASSUMED_HELDOUT_GROUPS * passes * rounds), cluster, training.workers
        )
        stages.append(replace(heldout, stage="evaluate"))
    if recipe.evaluate.sample_prompts:
        sampled = times.sampling_time(
            *(sizes, 2 * recipe.evaluate.sample_prompts, workload.prompt_tokens, recipe.evaluate.max_new_tokens),
            *(cluster, min(2, engines), reference.tensor_parallel, v),
        )
        stages.append(replace(sampled, stage="evaluate: samples"))
    return tuple(stages)


def _storage(recipe: Recipe, sizes: ModelSizes, workload: Workload, steps: int, trained: int) -> StorageNeeds:
    """Count files before compression: 4 bytes a token id and a log-prob; a schedule has four numbers a token."""
    t, tokens = recipe.train, workload.groups * workload.group_tokens
    scored = workload.groups * workload.completions * workload.completion_tokens
    taken = steps * t.groups_per_step / workload.groups  # epochs
    kept = t.keep_checkpoints + 1 + (t.best is not None)  # the one that is written is beside those that are kept
    state = (FLOAT32_BYTES + STATE_BYTES[t.optimizer.type]) * trained
    alone = t.lora is not None and not t.lora.merge
    return StorageNeeds(
        tokens=4 * tokens,
        reference=4 * scored if uses_reference(t.objective) else 0.0,
        schedule=taken * (16 * tokens + 4 * scored),
        checkpoints=kept * state,
        policy=FLOAT32_BYTES * trained if alone else _value_bytes(recipe) * sizes.parameters,
    )
