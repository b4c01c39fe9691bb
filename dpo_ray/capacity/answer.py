"""The resources that a recipe needs on a cluster: memory, time, storage, and what to change if it does not fit.

Everything is computed from the recipe, the sizes of the model and the data sheet of the GPU; nothing is started.
docs/capacity.md explains the method and its assumptions, and compares the results with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dpo_ray.config.objective import uses_reference
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.train import STATE_BYTES

from . import time as times
from .changes import Change, changes_of, nearest_that_fits
from .engine import EngineMemory
from .fit import Training, engine_on, problems_of, remarks_of, training_on, value_bytes
from .hardware import Cluster
from .memory import FLOAT32_BYTES, Weights
from .model_sizes import ModelSizes
from .time import StageTime, Traffic
from .workload import Workload, steps_of


@dataclass(frozen=True)
class StorageNeeds:
    """The bytes that a run's files need on the shared storage, before compression."""

    tokens: float
    reference: float
    schedule: float
    checkpoints: float
    policy: float


@dataclass(frozen=True)
class Capacity:
    """The result of planning a recipe on a cluster."""

    recipe: Recipe
    cluster: Cluster
    sizes: ModelSizes
    trained_parameters: int
    workload: Workload
    steps: int
    training: Training
    engine: EngineMemory | None  # None: no stage uses an engine
    problems: tuple[str, ...]  # why it does not fit; empty if it fits
    remarks: tuple[str, ...]
    changes: tuple[Change, ...]
    nearest: Cluster | None  # the fewest nodes of this shape that fit, if this cluster does not
    stages: tuple[StageTime, ...]
    traffic: Traffic
    storage: StorageNeeds

    @property
    def fits(self) -> bool:
        return not self.problems


def work_out(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster) -> Capacity:
    """Compute what a recipe needs on a cluster of GPUs: memory, time, traffic and storage."""
    training = training_on(recipe, sizes, workload, cluster)
    engine = engine_on(recipe, sizes, cluster)
    problems = problems_of(recipe, sizes, cluster, training, engine)
    trained = Weights.of(sizes, recipe.train).trained(sizes.layers)
    sent = times.traffic(
        sizes, recipe, cluster, training.workers, training.shard_ranks, training.batches.usual, value_bytes(recipe)
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
        remarks=remarks_of(recipe, cluster, training),
        changes=() if training.fits else tuple(changes_of(recipe, sizes, workload, cluster)),
        nearest=nearest_that_fits(recipe, sizes, workload, cluster) if problems else None,
        stages=_stages(recipe, sizes, workload, cluster, training, steps, sent),
        traffic=sent,
        storage=_storage(recipe, sizes, workload, steps, trained),
    )


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
    groups, rounds, v = float(workload.groups), 1, value_bytes(recipe)
    if recipe.online is not None:
        rounds, groups = recipe.online.rounds, float(recipe.online.prompts_per_round)
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
    stages.append(times.training_time(sizes, recipe, workload, cluster, training.workers, steps // rounds, sent))
    stages = [replace(s, flops=s.flops * rounds, seconds=s.seconds * rounds) for s in stages]
    if recipe.data.eval:
        passes = rounds + (steps // recipe.train.eval_every_steps if recipe.train.eval_every_steps else 0)
        heldout = times.scoring_time(
            sizes, workload, float(times.ASSUMED_HELDOUT_GROUPS * passes), cluster, training.workers
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
    """Compute the sizes of files before compression: a token id and a log-prob have 4 bytes each.

    A schedule holds four numbers per token, and the log-prob of each completion token.
    """
    t, tokens = recipe.train, workload.groups * workload.group_tokens
    scored = workload.groups * workload.completions * workload.completion_tokens
    taken = steps * t.groups_per_step / workload.groups  # epochs
    kept = t.keep_checkpoints + 1 + (t.best is not None)  # a new checkpoint is written before an old one is deleted
    state = (FLOAT32_BYTES + STATE_BYTES[t.optimizer.type]) * trained
    alone = t.lora is not None and not t.lora.merge
    return StorageNeeds(
        tokens=4 * tokens,
        reference=4 * scored if uses_reference(t.objective) else 0.0,
        schedule=taken * (16 * tokens + 4 * scored),
        checkpoints=kept * state,
        policy=FLOAT32_BYTES * trained if alone else value_bytes(recipe) * sizes.parameters,
    )
