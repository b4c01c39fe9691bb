"""An online run: rounds of sample -> judge -> pair -> reference -> schedule -> train -> evaluate -> promote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.digest import artifact_key
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.placement import check_room, resolve_hardware
from dpo_ray.cluster.room import has_room
from dpo_ray.config.judge import Judge
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.first_pass import PrepareTask
from dpo_ray.data.schemas import splits
from dpo_ray.observe.progress import Reporter
from dpo_ray.online.judges.protocol import Question, Usage, Verdict
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.completions import EngineModel, completion_logps
from dpo_ray.reference.engine import start_sampling_vllm
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.sampling import Sampling, prompt_table
from dpo_ray.run import planning, stages
from dpo_ray.run.context import RunContext, is_adapter, open_run, policy_directory, record_recipe
from dpo_ray.run.start_checks import check_packages, check_start
from dpo_ray.schedule.usable import check_usable

from . import ema, judging, measure, pair_stage, prompt_source
from .checks import check_judges, check_rounds
from .measure import PolicySamples
from .promotion import decide
from .recorded import record_rounds
from .round_plan import (
    ARTIFACT_STAGE,
    VERSIONS,
    Policy,
    Round,
    Rounds,
    carries,
    derive,
    derive_from,
    heldout_sampling_config,
    online_of,
    training_plan,
    version,
)
from .round_prompts import RoundPrompts
from .round_state import Done, Stage
from .sample import read_samples, sample

JUDGEMENTS = "judgements"  # a directory in the output with the judges' answers, which all runs share


def online(recipe: Recipe, reporter: Reporter, *, verbose: bool = False) -> tuple[Rounds, bool]:
    """Run all rounds that are not finished. Return the state of the rounds afterwards, and whether any stage had to run.

    Raises:
        DpoRayError: one of its subclasses, with what is wrong, where, and what to do. Committed artifacts are kept.
    """
    recipe = resolve_hardware(recipe, verbose=verbose)
    plan = planning.make_plan(recipe)
    rounds = derive(plan)
    if isinstance(rounds.action, Done):
        return rounds, False
    check_packages(plan.recipe)
    check_start(plan.recipe, plan.checked)
    check_rounds(plan.recipe, plan.checked)
    check_judges(online_of(recipe))
    with open_run(recipe, plan, reporter, verbose=verbose) as run:
        record_recipe(run, recipe)
        check_room(recipe, plan.to_run, plan.hardware.worker.gpus, plan.hardware.engine.gpus, reporter.say)
        driver = _Driver(run)
        try:
            return driver.run(), True
        finally:
            driver.close()


class _Driver:
    """The driver of a run's rounds. It holds the engines and judges, which are kept through all rounds."""

    def __init__(self, run: RunContext) -> None:
        self._run, self._plan, self._recipe, self._reporter = run, run.plan, run.recipe, run.reporter
        self._online = online_of(run.recipe)
        self._judges: dict[str, judging.Judges] = {}
        self._heldout_samples: dict[str, PolicySamples] = {}
        self._spent_usd = 0.0  # on judges, in this round
        self._rounds = derive(run.plan)

    def run(self) -> Rounds:
        """Run one stage after the other until none is left. The next stage follows from the committed artifacts."""
        self._prepared = stages.prepare(self._run)
        steps: dict[Stage, Callable[[Round], Artifact]] = {
            "sample": self._sample,
            "judge": self._judge,
            "pair": self._pair,
            "reference": self._reference,
            "schedule": self._schedule,
            "train": self._train,
            "evaluate": self._evaluate,
            "promote": self._promote,
        }
        while not isinstance(action := self._rounds.action, Done):
            record_rounds(self._rounds)
            if action.stage == "sample":
                self._spent_usd = 0.0
            steps[action.stage](self._rounds.rounds[-1])
            self._rounds = derive_from(self._plan, self._rounds.outside)
        record_rounds(self._rounds)
        self._reporter.say(f"the rounds end: {action.reason}")
        return self._rounds

    def close(self) -> None:
        """Stop the engines and the judges."""
        if "_pool" in vars(self):
            self._pool.close()
        for judges in self._judges.values():
            judges.close()

    # ---- the stages of a round

    def _sample(self, current: Round) -> Artifact:
        prompts = self._prompts.of_round(current.number)
        table = prompt_table(prompts, self._recipe.seed, current.number, self._online.sampling.samples_per_prompt)
        return self._sampled(
            f"round {current.number}: sample",
            current.start,
            table,
            self._begin(current, "sample"),
            self._provenance(current, "sample"),
        )

    def _judge(self, current: Round) -> Artifact:
        provenance, sampled = self._provenance(current, "judge"), list(read_samples(current.artifacts["sample"]))
        prompts = self._prompts
        questions = [
            Question(
                prompts.text(p.prompt_ids),
                tuple(map(prompts.text, p.completion_ids)),
                prompts.answers.get(p.prompt_ids),
            )
            for p in sampled
        ]
        verdicts, usage = self._ask(self._online.judge, f"round {current.number}: judge", questions)
        return judging.commit([p.key for p in sampled], verdicts, usage, self._begin(current, "judge"), provenance)

    def _pair(self, current: Round) -> Artifact:
        provenance = self._provenance(current, "pair")
        paired = pair_stage.run(
            current.number,
            current.artifacts["sample"],
            judging.read_verdicts(current.artifacts["judge"]),
            self._prepared,
            [earlier.artifacts["pair"] for earlier in self._rounds.rounds[: current.number - 1]],
            self._online,
            self._recipe.seed,
            self._mismatched_tokens,
            self._begin(current, "pair"),
            provenance,
        )
        figures = paired.manifest.figures
        dropped = ", ".join(f"{count:,} prompts {code.replace('_', ' ')}" for code, count in figures["dropped"].items())
        self._reporter.say(
            f"round {current.number}: {figures['pairs']:,} pairs{f'; without: {dropped}' if dropped else ''}"
        )
        check_usable(paired, self._recipe.train.objective)
        return paired

    @property
    def _mismatched_tokens(self) -> int | None:
        """Return the maximum length, in tokens, of a prompt together with a completion of another prompt.

        Return None if the objective needs no completions of other prompts.
        """
        longest = self._recipe.data.max_length_tokens + self._online.sampling.max_new_tokens
        return longest if planning.needs_mismatched(self._recipe) else None

    def _reference(self, current: Round) -> Artifact:
        assert current.reference is not None  # noqa: S101 - only objectives with a reference have this stage
        recipe, tokens = self._recipe, current.artifacts["pair"]
        provenance = self._provenance(current, "reference")
        model = self._engine_model(self._made(current.reference))
        groups = sum(tokens.rows[f"{split}/admitted"] for split in splits(tokens))
        with self._reporter.stage(f"round {current.number}: reference", "groups", groups) as bar:
            tally = reference_stage.score(
                tokens,
                model.store,
                model.settings,
                recipe.reference,
                recipe.train,
                self._plan.hardware.engine,
                recipe.data.max_quarantined_fraction,
                bar.advance,
                bar.say,
                self._pool,
            )
        return reference_stage.join(tokens, model.store, tally, self._begin(current, "reference"), provenance)

    def _schedule(self, current: Round) -> Artifact:
        return stages.schedule(self._context(current), current.artifacts["pair"], current.artifacts.get("reference"))

    def _train(self, current: Round) -> Artifact:
        self._make_room()
        carried = carries(self._online, self._rounds.rounds[: current.number - 1])
        start = current.start.artifact
        return stages.train(
            self._context(current),
            current.artifacts["schedule"],
            current.artifacts["pair"],
            trained_adapter=self._directory(current.start) if start and is_adapter(start) else None,
            moments=carried.artifacts["train"] if carried else None,
            keep_moments=self._online.optimizer == "carry",
        )

    def _evaluate(self, current: Round) -> Artifact:
        config, seed, number = self._online.evaluate, self._recipe.seed, current.number
        provenance, trained = self._provenance(current, "evaluate"), current.artifacts["train"]
        policies = {"policy": current.trained, "previous": current.start, "initial": self._rounds.initial}
        samples = {name: self._policy_samples(name, policy) for name, policy in policies.items()}
        ours = samples["policy"]
        logps = {name: self._logps(policies[name], ours) for name in ("policy", "initial")}
        judge = config.judge or self._online.judge
        against = {
            f"against_{name}": measure.compare(
                self._prompts.heldout_texts,
                ours,
                samples[name],
                lambda batch, name=name: self._ask(judge, f"round {number}: judge against the {name} policy", batch),
                config,
                seed,
            )
            for name in ("previous", "initial")
        }
        kl = logps["policy"] - logps["initial"]
        figures = measure.figures_of(ours, samples["initial"], samples["previous"], kl, config, seed)
        figures["initial"] = measure.sample_figures(samples["initial"])
        staging, initial = self._begin(current, "evaluate"), samples["initial"]
        return measure.commit(
            trained, self._prompts.heldout_texts, ours, initial, against, figures, staging, provenance
        )

    def _promote(self, current: Round) -> Artifact:
        figures = measure.round_figures(current.artifacts["evaluate"].manifest.figures)
        decision = decide(figures, self._online.promote_if)
        outcome = "promoted" if decision.promoted else "rejected"
        self._reporter.say(f"round {current.number}: {outcome} ({'; '.join(decision.reasons)})")
        return self._provenance(current, "promote").commit(
            self._begin(current, "promote"),
            [],
            rows={},
            figures={"promoted": decision.promoted, "reasons": list(decision.reasons)},
        )

    # ---- engines

    @cached_property
    def _pool(self) -> EnginePool:
        model = self._engine_model(self._rounds.initial)
        reference, say, engine = self._recipe.reference, self._reporter.say, self._plan.hardware.engine
        return EnginePool(model.settings, model.store, reference, engine, say, start_sampling_vllm, living=True)

    def _engine_model(self, policy: Policy) -> EngineModel:
        """Return the settings with which engines load a policy, and the store of its log-probs."""
        extra_tokens = self._online.sampling.max_new_tokens
        if policy.artifact is None:
            return self._run.reference_model(extra_tokens)
        return self._run.policy_model(policy.artifact, extra_tokens)

    def _make_room(self) -> None:
        """Stop the engines, and the judges that hold GPUs, if the cluster has too few free resources for training."""
        worker = self._plan.hardware.worker
        if worker.gpus and not has_room(worker, self._recipe.train.workers):
            self._pool.close()
            for judges in self._judges.values():
                if judges.gpus:
                    judges.close()

    def _sampled(
        self, title: str, policy: Policy, table: pa.Table, staging: Staging, provenance: Provenance
    ) -> Artifact:
        config = self._online.sampling
        model = self._engine_model(policy)
        self._pool.load(model.settings, model.store)
        sampling = Sampling(config.temperature, config.max_new_tokens, self._prompts.stops, config.top_p, config.min_p)
        kept = self._run.directory.child("samples", staging.key)
        with self._reporter.stage(title, "prompts", len(table)) as bar:
            return sample(self._pool, table, sampling, config.prompts_per_granule, kept, staging, provenance, bar)

    def _policy_samples(self, name: str, policy: Policy) -> PolicySamples:
        """Return a policy's completions of all held-out prompts. Sample them first if they do not exist yet.

        All policies sample with the same seeds.
        """
        if policy.key not in self._heldout_samples:
            config = heldout_sampling_config(self._plan)
            inputs = {"policy": policy.key, "prepare": self._plan.stages["prepare"].key}
            key = artifact_key("sample", VERSIONS["sample"], config, inputs)
            sampled = self._run.artifacts.find("sample", key)
            if sampled is None:
                provenance = self._run.provenance_of(VERSIONS["sample"], inputs, config)
                table = prompt_table(self._prompts.heldout, self._recipe.seed, 0, 1)
                staging = self._run.begin_key("sample", key)
                title = f"held-out samples of the {'new' if name == 'policy' else name} policy"
                sampled = self._sampled(title, policy, table, staging, provenance)
            prompts = self._prompts
            self._heldout_samples[policy.key] = measure.policy_samples(
                sampled, prompts.heldout_texts, prompts.tokenizer, self._plan.true_reward
            )
        return self._heldout_samples[policy.key]

    def _logps(self, policy: Policy, samples: PolicySamples) -> np.ndarray:
        granule = self._recipe.reference.groups_per_granule
        return completion_logps(
            self._pool, self._engine_model(policy), samples.prompt_ids, samples.completion_ids, granule
        )

    # ---- prompts and judges

    @cached_property
    def _prompts(self) -> RoundPrompts:
        return RoundPrompts(self._plan, self._prepared, self._prompts_artifact(), self._reporter.say)

    def _prompts_artifact(self) -> Artifact | None:
        """Return the artifact `prompts`, built now if it does not exist; None if the recipe has no `online.prompts`."""
        planned = self._rounds.outside.prompts
        if planned is None:
            return None
        if (done := self._run.artifacts.find("prompts", planned.key)) is not None:
            return done
        task = PrepareTask(str(self._run.model_directory), self._plan.checked.template, self._recipe.data)
        provenance = self._run.provenance_of(VERSIONS["prompts"], {}, planned.config)
        with self._reporter.stage("prompts", "prompts") as bar:
            read = prompt_source.run(planned.shards, task, self._run.begin_key("prompts", planned.key), provenance)
            bar.advance(read.rows["prompts"])
        return read

    def _ask(self, judge: Judge, title: str, questions: Sequence[Question]) -> tuple[list[Verdict], Usage]:
        kind = judge.model_dump_json()
        if kind not in self._judges:
            memory = Storage(self._recipe.output).child(JUDGEMENTS)
            device = self._plan.hardware.device
            self._judges[kind] = judging.Judges(
                judge,
                self._recipe.cluster.roles.judge,
                memory,
                f"{self._recipe.name}-{self._run.lease.token}",
                device,
                self._reporter.say,
            )
        with self._reporter.stage(title, "prompts", len(questions)) as bar:
            verdicts, usage = self._judges[kind].ask(questions, bar.advance, self._spent_usd)
        self._spent_usd += usage.usd
        return verdicts, usage

    # ---- artifacts

    def _made(self, policy: Policy) -> Policy:
        """Return `policy`. If it is a running mean of weights that does not exist yet, build it first."""
        if policy.artifact is not None or policy.mean_of is None:
            return policy
        mean, promoted = self._made(policy.mean_of[0]), policy.mean_of[1]
        config, inputs = {"decay": self._online.ema_decay}, {"mean": mean.key, "policy": promoted.key}
        provenance = self._run.provenance_of(VERSIONS["ema"], inputs, config)
        places = self._directory(mean), self._directory(promoted)
        return Policy(policy.key, ema.run(*places, config["decay"], self._run.begin_key("ema", policy.key), provenance))

    def _directory(self, policy: Policy) -> Path:
        return self._run.model_directory if policy.artifact is None else policy_directory(policy.artifact)

    def _context(self, current: Round) -> RunContext:
        """Return the run context for the stages `schedule` and `train` of a round.

        Its plan names the round's starting policy as the model to train.
        """
        start = self._recipe.model
        if current.start.artifact is not None and not is_adapter(current.start.artifact):
            start = ModelConfig(path=str(self._directory(current.start)), dtype=self._recipe.model.dtype)
        audited = current.reference is not None and current.reference.key == current.start.key
        return replace(self._run, plan=training_plan(self._rounds, current, start, audited=audited))

    def _begin(self, current: Round, stage: Stage) -> Staging:
        return self._run.begin_key(ARTIFACT_STAGE.get(stage, stage), current.stages[stage].key)

    def _provenance(self, current: Round, stage: Stage) -> Provenance:
        planned = current.stages[stage]
        return self._run.provenance_of(version(stage), planned.inputs, planned.config)
