"""The plan of a recipe's rounds: the policies of each round, and the keys of its artifacts.

Making the plan starts nothing and reads no training data.
"""

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
"""The name of a stage's artifact, if it differs from the stage's name. (`evaluate` is an artifact of offline runs.)"""


@dataclass(frozen=True)
class PromptsPlan:
    """The plan for the prompts of `online.prompts`: the shards (files), and the key of the artifact built from them."""

    shards: tuple[Shard, ...]
    config: dict[str, Any]
    key: str


@dataclass(frozen=True)
class OutsideInputs:
    """The inputs of the rounds that are not in the recipe itself: files of prompts, and files of the judges.

    They are read once, so that a file that changes while the rounds run changes no key.
    """

    prompts: PromptsPlan | None  # None: the prompts of the training data
    judge: str  # digest of the judge
    evaluation_judge: str  # digest of the judge that compares policies


@dataclass(frozen=True)
class Policy:
    """A model that a round starts from, trains, or is compared with."""

    key: str  # key of the artifact that holds the model; for the recipe's own model, the digest of the model
    artifact: Artifact | None  # None: it is the recipe's own model, or it does not exist yet
    mean_of: tuple[Policy, Policy] | None = None  # for a running mean: the previous mean, and the policy added to it


@dataclass(frozen=True)
class Round:
    """One round: the policy that it starts from, the plan of its stages, and the artifacts that exist already."""

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
    """The state of all rounds: those that have begun, the next round if there is one, and the next action."""

    plan: Plan  # of the recipe
    outside: OutsideInputs
    initial: Policy
    rounds: tuple[Round, ...]
    action: Action
    stopped: str | None  # the reason for which a rule of online.stop_if ends the rounds; None: no rule does

    @property
    def promoted(self) -> Policy:
        """Return the policy of the last round whose policy was promoted; the recipe's `model` if there is none."""
        last = starting_policy([r.committed for r in self.rounds], len(self.rounds) + 1)
        return self.initial if last is None else self.rounds[last - 1].trained


def online_of(recipe: Recipe) -> OnlineConfig:
    """Return the section `online` of a recipe. The recipe must have this section."""
    assert recipe.online is not None  # noqa: S101
    return recipe.online


def derive(plan: Plan) -> Rounds:
    """Derive the state of a recipe's rounds from the committed artifacts.

    Raises:
        ConfigError: a path of online.prompts matches nothing, or the function or model of a judge is missing.
        ArtifactError: a stage of a round has an artifact although an earlier stage has none.
    """
    online = online_of(plan.recipe)
    judges = online.judge, online.evaluate.judge or online.judge
    return derive_from(plan, OutsideInputs(prompts_plan(plan), *map(judge_digest, judges)))


def derive_from(plan: Plan, outside: OutsideInputs) -> Rounds:
    """Derive the state of a recipe's rounds from the committed artifacts and from inputs that were read before.

    Raises:
        ArtifactError: a stage of a round has an artifact although an earlier stage has none.
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
    """Return the plan for the prompts of `online.prompts`; None if the recipe does not have this field.

    Raises:
        ConfigError: a path of online.prompts matches nothing.
    """
    recipe, sources = plan.recipe, online_of(plan.recipe).prompts
    if sources is None:
        return None
    shards = tuple(list_shards("prompts", sources))
    tokenizer = tokenizer_identity(recipe.model)
    config = {"shards": shard_configs(shards, recipe.data, tokenizer, plan.checked.template, ())}
    return PromptsPlan(shards, config, artifact_key("prompts", VERSIONS["prompts"], config, {}))


def next_mean(store: ArtifactStore, mean: Policy, promoted: Policy, decay: float) -> Policy:
    """Return the running mean that results from `mean` and the policy `promoted`. Its artifact may not exist yet."""
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
    """Plan the next round: compute the keys of its artifacts, and find the artifacts that exist already."""
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
    """Return the version number of a stage's code, which is part of the stage's key."""
    return VERSIONS[stage] if stage in VERSIONS else planning.VERSIONS[stage]


def _configs(
    plan: Plan, outside: OutsideInputs, number: int, start: Policy, reference: Policy | None, earlier: Sequence[Round]
) -> dict[Stage, dict[str, Any]]:
    """Return, for each stage of a round, all settings on which its result depends. They are part of the stage's key."""
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
    """Return the round whose optimizer state the next round loads: the last round with a promoted policy.

    Return None if there is no such round, or if the recipe does not carry the optimizer state over. Then the next round
    starts with a new optimizer.
    """
    last = starting_policy([r.committed for r in earlier], len(earlier) + 1)
    return earlier[last - 1] if online.optimizer == "carry" and last is not None else None


def sampler_config(plan: Plan) -> dict[str, Any]:
    """Return the settings of the engines on which samples depend."""
    return {"engine": planning.engine_version("vllm"), "device": plan.hardware.device, "dtype": plan.hardware.dtype}


def heldout_sampling_config(plan: Plan) -> dict[str, Any]:
    """Return the settings on which samples of the held-out prompts depend, besides the policy and the data."""
    online = online_of(plan.recipe)
    sampling = online.sampling.model_dump(mode="json", exclude={"samples_per_prompt", "pair_truncated"})
    return {"seed": plan.recipe.seed, "heldout_prompts": online.evaluate.prompts, **sampling, **sampler_config(plan)}


def training_plan(rounds: Rounds, current: Round, start: ModelConfig, *, audited: bool) -> Plan:
    """Return the plan for the stages `schedule` and `train` of a round, in the form of an offline run's plan.

    Args:
        start: location of the policy that the round starts from.
        audited: whether the policy at `start` is the reference model. Only then can training audit the reference
            log-probs.
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
