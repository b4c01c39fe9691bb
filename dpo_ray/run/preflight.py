"""The checks of a recipe before anything starts: output directories, devices, files, model, chat template, lengths."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from dpo_ray.artifacts.places import reference_root, run_storage
from dpo_ray.cluster.resources import Resources, engine_resources, sampler_resources, worker_resources
from dpo_ray.config.extension import FORMATS, JUDGES, OBJECTIVES, TRACKERS, installed
from dpo_ray.config.model import is_hub_name
from dpo_ray.config.objective import uses_reference
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.filters import Filter, load_filters
from dpo_ray.data.sources import Shard, list_shards
from dpo_ray.data.tokenizing.chat import load_tokenizer, resolve_template
from dpo_ray.errors import ConfigError, InfrastructureError
from dpo_ray.models import lora
from dpo_ray.models.adapter import adapter_directory, check_targets, read_adapter
from dpo_ray.models.files import check_weights
from dpo_ray.models.load import context_tokens, model_directory
from dpo_ray.reference.vllm.engine import lora_options

BITSANDBYTES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")  # optimizers that use its kernels


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
    """Check everything in a recipe that can be checked without starting anything: files, model, lengths, filters, ...

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
    check_weights(directory, tokenizer.get_vocab(), f"model.path={recipe.model.path}")
    if recipe.train.lora is not None:
        lora.check_targets(recipe.train.lora, directory)
    context = context_tokens(directory)
    if context is not None and recipe.data.max_length_tokens > context:
        raise ConfigError(
            f"this is longer than the model's context of {context} tokens (for a model with longrope, its original context)",
            where=f"data.max_length_tokens={recipe.data.max_length_tokens}",
            fix=f"set at most {context}",
        )
    return Checked(shards, resolve_template(recipe.data.chat_template, tokenizer), filters)


def check_packages(recipe: Recipe) -> None:
    """Check that the optional packages that this recipe needs, vLLM and bitsandbytes, are installed.

    Raises:
        InfrastructureError: a package is not installed; the message names it.
    """
    scores = uses_reference(recipe.train.objective) and recipe.reference.engine == "vllm"
    if (scores or recipe.evaluate.sample_prompts) and find_spec("vllm") is None:
        raise InfrastructureError(
            "vLLM is not installed",
            where="reference.engine, evaluate.sample_prompts",
            fix="pip install 'dpo-ray[cpu]' or 'dpo-ray[gpu]'; or set reference.engine=trainer and evaluate.sample_prompts=0",
        )
    by_bitsandbytes = recipe.train.quantization or recipe.train.optimizer.type in BITSANDBYTES
    if by_bitsandbytes and find_spec("bitsandbytes") is None:
        raise InfrastructureError(
            "bitsandbytes is not installed",
            where=f"train.optimizer.type={recipe.train.optimizer.type}, train.quantization={recipe.train.quantization}",
            fix="pip install 'dpo-ray[quantized]'; or use another optimizer and no quantization",
        )


def _check_places(recipe: Recipe) -> None:
    """Check that directories can be made for the run and the reference store, without creating them.

    `dpo-ray plan` and `dpo-ray validate` must write nothing.
    """
    for field, place in (("output", run_storage(recipe)), ("reference.store", reference_root(recipe))):
        if not place.is_local:
            continue
        nearest = place.local_path()
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            raise ConfigError(
                f"`{nearest}` is not a directory, so nothing can be written there",
                where=f"{field}={place.uri}",
                fix="name a directory, existing or new, or s3://bucket/prefix, gs://bucket/prefix",
            )


def _check_adapter(recipe: Recipe, model: Path | None) -> None:
    """Check that the recipe's LoRA adapter is valid, that vLLM can load it, and that it fits the model.

    The last check is left out if the model is not on this machine.
    """
    directory = adapter_directory(recipe.model)
    if directory is None:
        return
    adapter = read_adapter(directory)
    if model is not None:
        check_targets(adapter, model)
    if recipe.reference.engine == "vllm" or recipe.evaluate.sample_prompts:
        lora_options(adapter)


def _check_gpus(recipe: Recipe) -> None:
    """Check that a recipe for this machine requests no more GPUs than it has, because Ray would wait forever for more.

    Raises:
        ConfigError: the recipe requests more GPUs.
    """
    where = hardware(recipe)
    wanted = {"train.workers": recipe.train.workers * where.worker.gpus}
    if recipe.reference.engine == "vllm":
        wanted["reference.replicas"] = recipe.reference.replicas * where.engine.gpus
    if recipe.reference.mode == "streaming":
        wanted["train.workers and reference.replicas, concurrently in reference.mode=streaming"] = sum(wanted.values())
    for field, gpus in wanted.items() if recipe.ray.address == "local" else ():
        if gpus > torch.cuda.device_count():
            raise ConfigError(
                f"requests {gpus:g} GPUs, but this machine has {torch.cuda.device_count()}",
                where=field,
                fix="lower it, or the GPUs in cluster.roles; or name a cluster in ray.address",
            )
