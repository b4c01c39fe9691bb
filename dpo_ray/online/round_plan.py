"""The plan of a recipe's rounds: the policies of each, and the keys of its artifacts. Starts nothing, reads no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.digest import artifact_key, digest
from dpo_ray.artifacts.places import artifact_store
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.objective import uses_reference
from dpo_ray.config.online import OnlineConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.keys import shard_configs
from dpo_ray.data.sources import Shard, list_shards
from dpo_ray.models.load import tokenizer_identity
from dpo_ray.online.judges.make import judge_digest
from dpo_ray.run import planning
from dpo_ray.run.planning import Plan, StagePlan

from .measure import round_figures
from .promotion import DecidedRound, stop_reason
from .round_state import Action, Committed, Done, Stage, next_action, stages_of_round, starting_policy

VERSIONS = {"prompts": 1, "sample": 2, "judge": 1, "pair": 1, "evaluate": 2, "promote": 1, "ema": 1}
ARTIFACT_STAGE: dict[Stage, str] = {"evaluate": "measure"}
"""Artifact names that differ from the stage's name: a round's evaluation is not that of an offline run."""


@dataclass(frozen=True)
class PromptsPlan:
    """A separate source of prompts: its shards, and the key of the artifact that is built from them."""

    shards: tuple[Shard, ...]
    config: dict[str, Any]
    key: str


@dataclass(frozen=True)
class OutsideInputs:
    """What rounds depend on outside the recipe, read once: a file that changes while they run changes no key."""

    prompts: PromptsPlan | None  # None: the prompts of the training data
    judge: str  # digest
    evaluation_judge: str


@dataclass(frozen=True)
class Policy:
    """A model that rounds start from, end with, or are compared with."""

    key: str  # of the artifact that holds it; for the recipe's own model, its digest
    artifact: Artifact | None  # None: the recipe's own model, or one that does not exist yet
    mean_of: tuple[Policy, Policy] | None = None  # for a running mean: the previous mean, and the policy added to it


@dataclass(frozen=True)
class Round:
    """One round: what it starts from, and its stages with the artifacts that exist."""

    number: int
    start: Policy
    reference: Policy | None  # None: the objective uses no reference
    stages: dict[Stage, StagePlan]
    artifacts: dict[Stage, Artifact]

    @property
    def committed(self) -> Committed:
        promoted = self.artifacts["promote"].manifest.figures["promoted"] if "promote" in self.artifacts else None
        return Committed(self.number, frozenset(self.artifacts), promoted)

    @property
    def trained(self) -> Policy:
        """Return the policy that the round has trained, or will train."""
        return Policy(self.stages["train"].key, self.artifacts.get("train"))


@dataclass(frozen=True)
class Rounds:
    """All rounds that have begun, the next one if there is one, and the next action."""

    plan: Plan  # of the recipe: its data, its hardware
    outside: OutsideInputs
    initial: Policy
    rounds: tuple[Round, ...]
    action: Action
    stopped: str | None  # the stop rule that ends the rounds; None: none does

    @property
    def promoted(self) -> Policy:
        """Return the policy of the last promoted round; without one, the recipe's own model."""
        last = starting_policy([r.committed for r in self.rounds], len(self.rounds) + 1)
        return self.initial if last is None else self.rounds[last - 1].trained


def online_of(recipe: Recipe) -> OnlineConfig:
    """Return the section `online` of a recipe that is known to have it."""
    assert recipe.online is not None  # noqa: S101
    return recipe.online


def derive(plan: Plan) -> Rounds:
    """Derive the state of a recipe's rounds.

    Raises:
        ConfigError: a path of online.prompts matches nothing, or a judge's function or model is missing.
        ArtifactError: what is committed contradicts the order of a round's stages.
    """
    online = online_of(plan.recipe)
    judges = online.judge, online.evaluate.judge or online.judge
    return derive_from(plan, OutsideInputs(prompts_plan(plan), *map(judge_digest, judges)))


def derive_from(plan: Plan, outside: OutsideInputs) -> Rounds:
    """Derive the state of the rounds from what is committed, and from outside inputs that were read before.

    Raises:
        ArtifactError: what is committed contradicts the order of a round's stages.
    """
    recipe, store = plan.recipe, artifact_store(plan.recipe)
    online, with_reference = online_of(recipe), uses_reference(recipe.train.objective)
    initial = Policy(plan.model_digest, None)
    rounds: list[Round] = []
    mean = initial
    while True:
        committed = [r.committed for r in rounds]
        last = starting_policy(committed, len(rounds) + 1)
        start = initial if last is None else rounds[last - 1].trained
        if online.reference == "ema" and rounds and committed[-1].promoted:
            mean = next_mean(store, mean, start, online.ema_decay)
        stopped = _stop_reason(rounds, online)
        action = next_action(committed, online.rounds, stopped, with_reference)
        decided = not rounds or committed[-1].promoted is not None
        if not decided or isinstance(action, Done):
            return Rounds(plan, outside, initial, tuple(rounds), action, stopped)
        reference = {"initial": initial, "previous": start, "ema": mean}[online.reference] if with_reference else None
        rounds.append(_planned(plan, store, outside, initial, start, reference, rounds))


def prompts_plan(plan: Plan) -> PromptsPlan | None:
    """Return the plan of the prompts that rounds sample for, if the recipe names a separate source; otherwise None.

    Raises:
        ConfigError: a path matches nothing.
    """
    recipe, sources = plan.recipe, online_of(plan.recipe).prompts
    if sources is None:
        return None
    shards = tuple(list_shards("prompts", sources))
    tokenizer = tokenizer_identity(recipe.model)
    config = {"shards": shard_configs(shards, recipe.data, tokenizer, plan.checked.template, ())}
    return PromptsPlan(shards, config, artifact_key("prompts", VERSIONS["prompts"], config, {}))


def next_mean(store: ArtifactStore, mean: Policy, promoted: Policy, decay: float) -> Policy:
    """Return the running mean after a promotion."""
    key = artifact_key("ema", VERSIONS["ema"], {"decay": decay}, {"mean": mean.key, "policy": promoted.key})
    return Policy(key, store.find("ema", key), (mean, promoted))


def _stop_reason(rounds: Sequence[Round], online: OnlineConfig) -> str | None:
    history = [
        DecidedRound(round_figures(r.artifacts["evaluate"].manifest.figures), bool(r.committed.promoted))
        for r in rounds
        if r.committed.promoted is not None
    ]
    return stop_reason(history, online.stop_if)


def _planned(
    plan: Plan,
    store: ArtifactStore,
    outside: OutsideInputs,
    initial: Policy,
    start: Policy,
    reference: Policy | None,
    earlier: Sequence[Round],
) -> Round:
    """Plan the next round: compute the keys of its artifacts, and look up those that exist."""
    number = len(earlier) + 1
    configs = _configs(plan, outside, number, start, reference, earlier)
    keys = {"prepare": plan.stages["prepare"].key, "policy": start.key, "initial": initial.key}
    keys["earlier"] = digest([r.stages["pair"].key for r in earlier])
    if outside.prompts is not None:
        keys["prompts"] = outside.prompts.key
    reads: dict[Stage, tuple[str, ...]] = {
        "sample": ("policy", "prepare", "prompts"),
        "judge": ("sample",),
        "pair": ("sample", "judge", "prepare", "earlier"),
        "reference": ("pair",),
        "schedule": ("pair", "reference"),
        "train": ("schedule",),
        "evaluate": ("train", "policy", "initial", "prepare"),
        "promote": ("evaluate",),
    }
    stages: dict[Stage, StagePlan] = {}
    artifacts: dict[Stage, Artifact] = {}
    for stage in stages_of_round(reference is not None):
        inputs = {name: keys[name] for name in reads[stage] if name in keys}
        name = ARTIFACT_STAGE.get(stage, stage)
        key = artifact_key(name, version(stage), configs[stage], inputs)
        keys[stage] = key
        artifact = store.find(name, key)
        stages[stage] = StagePlan(stage, key, configs[stage], inputs, "done" if artifact else "missing", "")
        if artifact is not None:
            artifacts[stage] = artifact
    return Round(number, start, reference, stages, artifacts)


def version(stage: Stage) -> int:
    """Return the version of a stage's code."""
    return VERSIONS[stage] if stage in VERSIONS else planning.VERSIONS[stage]


def _configs(
    plan: Plan, outside: OutsideInputs, number: int, start: Policy, reference: Policy | None, earlier: Sequence[Round]
) -> dict[Stage, dict[str, Any]]:
    """Return, for each stage of a round, what its result depends on in the recipe."""
    recipe, online = plan.recipe, online_of(plan.recipe)
    own = {"seed": recipe.seed, "round": number}
    scored = planning.stage_configs(recipe, {}, reference.key if reference else "", plan.numerics, plan.hardware)
    trained = planning.stage_configs(recipe, {}, start.key, plan.numerics, plan.hardware)
    moments = {"moments": carried.trained.key} if (carried := carries(online, earlier)) else {}
    return {
        "sample": {
            **own,
            "prompts": online.prompts_per_round,
            **online.sampling.model_dump(mode="json", exclude={"pair_truncated"}),
            **sampler_config(plan),
        },
        "judge": {"judge": outside.judge},
        "pair": {
            **own,
            **online.pairing.model_dump(mode="json"),
            "pair_truncated": online.sampling.pair_truncated,
            "mix": online.mix.model_dump(mode="json"),
            **({"mismatched": True} if planning.needs_mismatched(recipe) else {}),
        },
        "reference": scored["reference"],
        "schedule": scored["schedule"],
        "train": {**trained["train"], **moments},
        "evaluate": {
            "seed": recipe.seed,
            "judge": outside.evaluation_judge,
            **online.evaluate.model_dump(mode="json", exclude={"judge"}),
            **heldout_sampling_config(plan),
        },
        "promote": online.promote_if.model_dump(mode="json"),
    }


def carries(online: OnlineConfig, earlier: Sequence[Round]) -> Round | None:
    """Return the round whose optimizer state the next round loads: the last promoted, or None for a new optimizer."""
    last = starting_policy([r.committed for r in earlier], len(earlier) + 1)
    return earlier[last - 1] if online.optimizer == "carry" and last is not None else None


def sampler_config(plan: Plan) -> dict[str, Any]:
    """Return what samples depend on in the engines."""
    return {"engine": planning.engine_version("vllm"), "device": plan.hardware.device, "dtype": plan.hardware.dtype}


def heldout_sampling_config(plan: Plan) -> dict[str, Any]:
    """Return what a policy's samples of the held-out prompts depend on, besides the policy and the data."""
    online = online_of(plan.recipe)
    sampling = online.sampling.model_dump(mode="json", exclude={"samples_per_prompt", "pair_truncated"})
    return {"seed": plan.recipe.seed, "heldout_prompts": online.evaluate.prompts, **sampling, **sampler_config(plan)}


def training_plan(rounds: Rounds, current: Round, start: ModelConfig, *, audited: bool) -> Plan:
    """Return the plan to schedule and train a round: an offline run from the policy that the round starts with.

    Args:
        start: the location of that policy.
        audited: whether training starts from the reference model, so that the reference can be audited by it.
    """
    recipe = rounds.plan.recipe
    audit = recipe.reference.audit if audited else recipe.reference.audit.model_copy(update={"groups": 0})
    sections = {"model": start, "reference": recipe.reference.model_copy(update={"audit": audit})}
    config = current.stages["schedule"].config
    ordering = {k: v for k, v in config.items() if k not in ("workers", "tokens_per_micro_batch")}
    data = [current.stages[s].key for s in ("pair", "reference") if s in current.stages]
    resume = digest([current.stages["train"].config, ordering, *data])[:20]
    stages = {str(name): stage for name, stage in current.stages.items()}
    return replace(rounds.plan, recipe=recipe.model_copy(update=sections), stages=stages, resume_key=resume)
