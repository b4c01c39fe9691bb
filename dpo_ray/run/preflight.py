"""The checks of a recipe before anything starts: output directories, devices, files, model, chat template, lengths."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dpo_ray.artifacts.places import reference_root, run_storage
from dpo_ray.cluster.resources import (
    Resources,
    engine_resources,
    judge_resources,
    sampler_resources,
    worker_resources,
)
from dpo_ray.config.data import EVAL
from dpo_ray.config.extension import FORMATS, JUDGES, OBJECTIVES, TRACKERS, installed
from dpo_ray.config.model import is_hub_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.filters import Filter, load_filters
from dpo_ray.data.sources import Shard, list_shards
from dpo_ray.data.tokenizing.chat import load_tokenizer, resolve_template
from dpo_ray.errors import ArtifactError, ConfigError
from dpo_ray.models import lora
from dpo_ray.models.adapter import adapter_directory, check_targets, read_adapter
from dpo_ray.models.files import check_architecture, check_weights
from dpo_ray.models.load import attention_heads, context_tokens, model_directory
from dpo_ray.reference.vllm.engine import LORA_RANKS, lora_options
from dpo_ray.train.measures import EVALUATED

LONGEST_NAME_BYTES = 255  # of one part of a path, on all usual file systems


@dataclass(frozen=True)
class Hardware:
    """The hardware of a run, decided before anything starts: the device, the data type, and what workers request."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    worker: Resources  # of a training worker
    engine: Resources
    sampler: Resources  # of an engine that samples for an evaluation


@dataclass(frozen=True)
class Checked:
    """What the checks of a recipe have found: the shards of its data, its chat template and its filters."""

    shards: tuple[Shard, ...]
    template: str  # the chat template's text; for a hub model that is not on this machine, its name in the recipe
    filters: tuple[Filter, ...]
    parameters: int | None = None  # of the model; None for a hub model that is not on this machine
    trained: int | None = None  # how many of them, or of the adapter, are trained


def hardware(recipe: Recipe) -> Hardware:
    """Return the hardware of a run. What the recipe does not set depends on whether this machine has a GPU (CUDA)."""
    gpu_here = 1.0 if torch.cuda.is_available() else 0.0
    roles = recipe.cluster.roles
    train_gpus = roles.train.gpus if roles.train.gpus is not None else gpu_here
    engine_gpus = roles.reference.gpus
    if engine_gpus is None:
        engine_gpus = float(recipe.reference.tensor_parallel * (train_gpus > 0))
    device = "cuda" if train_gpus else "cpu"
    dtype = recipe.model.dtype if recipe.model.dtype != "auto" else ("bfloat16" if train_gpus else "float32")
    return Hardware(
        device,
        dtype,
        worker_resources(roles.train, train_gpus),
        engine_resources(roles.reference, engine_gpus),
        sampler_resources(roles, engine_gpus),
    )


def preflight(recipe: Recipe) -> Checked:
    """Check everything in a recipe that needs no start of Ray or of an engine: files, model, lengths, filters, ...

    Raises:
        ConfigError, InfrastructureError: the first problem that is found.
    """
    for group in (OBJECTIVES, FORMATS, JUDGES, TRACKERS):
        installed(group)  # what other packages add; if it cannot be imported, a run would fail later
    _check_places(recipe)
    _check_gpus(recipe)
    sets = {"train": recipe.data.train, **recipe.data.eval_sets}
    shards = tuple(shard for split, sources in sets.items() for shard in list_shards(split, sources))
    filters = load_filters(recipe.data.rules.filters)
    _check_best(recipe)
    if recipe.evaluate.sample_prompts and not recipe.data.eval:
        raise ConfigError(
            "sampling needs prompts from held-out data, but there is no held-out data",
            where="evaluate.sample_prompts",
            fix="set data.eval, or evaluate.sample_prompts=0",
        )
    directory = None if is_hub_name(recipe.model.path) else model_directory(recipe.model)
    _check_adapter(recipe, directory)
    if directory is None:
        return Checked(shards, resolve_template(recipe.data.chat_template, None), filters)
    tokenizer = load_tokenizer(str(directory))
    check_architecture(directory, f"model.path={recipe.model.path}")
    parameters = check_weights(directory, tokenizer.get_vocab(), f"model.path={recipe.model.path}")
    trained = parameters if recipe.train.lora is None else lora.check_targets(recipe.train.lora, directory)
    _check_lengths(recipe, context_tokens(directory))
    _check_stop_tokens(recipe, len(tokenizer))
    _check_tensor_parallel(recipe, attention_heads(directory))
    return Checked(shards, resolve_template(recipe.data.chat_template, tokenizer), filters, parameters, trained)


def _check_lengths(recipe: Recipe, context: int | None) -> None:
    """Check that data and samples fit in the model's context."""
    if context is None:
        return
    if recipe.data.max_length_tokens > context:
        raise ConfigError(
            f"this is longer than the model's context of {context} tokens (for a model with longrope, its original context)",
            where=f"data.max_length_tokens={recipe.data.max_length_tokens}",
            fix=f"set at most {context}",
        )
    new_tokens = {"evaluate.max_new_tokens": recipe.evaluate.max_new_tokens if recipe.evaluate.sample_prompts else 0}
    if recipe.online is not None:
        new_tokens = {"online.sampling.max_new_tokens": recipe.online.sampling.max_new_tokens}
    for field, count in new_tokens.items():
        if count >= context:
            raise ConfigError(
                f"so many new tokens leave no room for a prompt: the model's context has {context} tokens",
                where=f"{field}={count}",
                fix=f"set at most {context - 1} minus the tokens of the longest prompt",
            )


def _check_stop_tokens(recipe: Recipe, tokens: int) -> None:
    own = () if recipe.online is None else recipe.online.sampling.stop_token_ids
    if beyond := [token for token in own if token >= tokens]:
        raise ConfigError(
            f"the tokenizer has no token {beyond[0]}; its ids end at {tokens - 1}",
            where="online.sampling.stop_token_ids",
            fix="remove the id, or correct it",
        )


def _check_tensor_parallel(recipe: Recipe, heads: int | None) -> None:
    parallel = recipe.reference.tensor_parallel
    if heads is not None and heads % parallel:
        raise ConfigError(
            f"vLLM distributes the attention heads equally, and the model's {heads} heads cannot be divided by {parallel}",
            where=f"reference.tensor_parallel={parallel}",
            fix=f"set a divisor of {heads}",
        )


def _check_best(recipe: Recipe) -> None:
    best = recipe.train.best
    known = [f"{split}_{name}" for split in dict.fromkeys([EVAL, *recipe.data.eval_sets]) for name in EVALUATED]
    if best is not None and best.metric not in known:
        near = difflib.get_close_matches(best.metric, known, n=3, cutoff=0)
        raise ConfigError(
            "evaluations have no such metric",
            where=f"train.best.metric={best.metric}",
            fix=f"use a metric that evaluations have, such as {', '.join(near)}",
        )


def _check_places(recipe: Recipe) -> None:
    """Check that the output directories exist or can be created, and can be written to. Change nothing on the disk."""
    for field, find in (("output", run_storage), ("reference.store", reference_root)):
        try:
            place = find(recipe)
        except ConfigError as error:  # it names only the address, not the field
            raise ConfigError(error.what, where=f"{field}={error.where}", fix=error.fix) from None
        if not place.is_local:
            continue
        for part in place.local_path().parts:
            if len(os.fsencode(part)) > LONGEST_NAME_BYTES:
                raise ConfigError(
                    f"`{part[:40]}...` is longer than the {LONGEST_NAME_BYTES} bytes that a name may have",
                    where=field,
                    fix="choose a shorter name",
                )
        nearest = nearest_existing(place.local_path())
        if not nearest.is_dir():
            raise ConfigError(
                f"`{nearest}` is not a directory, so nothing can be written there",
                where=f"{field}={place.uri}",
                fix="name a directory, existing or new, or s3://bucket/prefix, gs://bucket/prefix",
            )
        if recipe.ray.address == "local" and not os.access(nearest, os.W_OK | os.X_OK):
            raise ArtifactError(
                f"cannot create anything in `{nearest}`: this user has no permission, or the disk is read-only",
                where=f"{field}={place.uri}",
                fix="grant the permission, or choose another location",
            )


def nearest_existing(path: Path) -> Path:
    """Return the path, or else the nearest of its parents that exists."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def _check_adapter(recipe: Recipe, model: Path | None) -> None:
    """Check that the recipe's LoRA adapter is valid, that vLLM can load it, and that it fits the model.

    If the model is not on this machine, do not check whether the adapter fits it.
    """
    own, samples = recipe.train.lora, recipe.evaluate.sample_prompts or recipe.online is not None
    if own is not None and not own.merge and samples and own.rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"vLLM, which samples from the policy, loads adapters of at most rank {LORA_RANKS[-1]}",
            where=f"train.lora.rank={own.rank}",
            fix="lower the rank, or set train.lora.merge=true",
        )
    directory = adapter_directory(recipe.model)
    if directory is None:
        return
    adapter = read_adapter(directory)
    if model is not None:
        check_targets(adapter, model)
    if recipe.reference.engine == "vllm" or recipe.evaluate.sample_prompts:
        lora_options(adapter)


def _check_gpus(recipe: Recipe) -> None:
    """Check that a recipe for a local Ray needs no more GPUs than this machine has; Ray would wait forever for more.

    Raises:
        ConfigError: the recipe requests more GPUs than this machine has.
    """
    where = hardware(recipe)
    wanted = {"train.workers": recipe.train.workers * where.worker.gpus}
    if recipe.reference.engine == "vllm":
        wanted["reference.replicas"] = recipe.reference.replicas * where.engine.gpus
    if recipe.reference.mode == "streaming":
        wanted["train.workers and reference.replicas, concurrently in reference.mode=streaming"] = sum(wanted.values())
    if recipe.online is not None:
        role = recipe.cluster.roles.judge
        wanted["online.judge"] = max(
            judge_resources(judge, role).gpus for judge in recipe.online.named_judges().values()
        )
    for field, gpus in wanted.items() if recipe.ray.address == "local" else ():
        if gpus > torch.cuda.device_count():
            raise ConfigError(
                f"the recipe requests {gpus:g} GPUs, but this machine has {torch.cuda.device_count()}",
                where=field,
                fix="lower this number, or cluster.roles.train.gpus, cluster.roles.reference.gpus and cluster.roles.judge.gpus; or "
                "name a cluster in ray.address",
            )
