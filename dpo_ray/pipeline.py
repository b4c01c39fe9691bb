"""An offline run: prepare -> reference -> schedule -> train -> evaluate, each stage skipped where its artifact is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from dpo_ray import drift, overlap, planning
from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.asks import sampler_ask
from dpo_ray.cluster.placement import check_room, placed
from dpo_ray.cluster.session import session
from dpo_ray.cluster.workers import start_inbox
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.data import stage as prepare_stage
from dpo_ray.data import synthetic
from dpo_ray.data.chat import load_tokenizer
from dpo_ray.data.keys import SHARD_VERSION, shard_key
from dpo_ray.data.merge import PreparedShard, broken_shards, check_quarantined
from dpo_ray.data.prepare import PrepareTask
from dpo_ray.data.tokens import sources_of, splits
from dpo_ray.errors import ArtifactError, AuditError, DataError
from dpo_ray.evaluate import stage as evaluate_stage
from dpo_ray.evaluate.metrics import Comparison
from dpo_ray.models.adapter import CONFIG as ADAPTER_CONFIG
from dpo_ray.models.adapter import adapter_directory
from dpo_ray.models.load import BUILTIN, context_tokens, is_hub_name, model_directory
from dpo_ray.observe.model_card import model_card
from dpo_ray.observe.progress import Reporter
from dpo_ray.observe.sinks import MetricsSinks, follow
from dpo_ray.online.sampler import compare
from dpo_ray.places import artifact_store, reference_root, run_storage
from dpo_ray.planning import Plan
from dpo_ray.preflight import check_packages
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.audit import measure
from dpo_ray.reference.sampling import Sampling
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.streaming import UnscorableError
from dpo_ray.reference.verdict import check_drift
from dpo_ray.schedule import stage as schedule_stage
from dpo_ray.schedule.feed import LiveSchedule
from dpo_ray.schedule.records import Schedule
from dpo_ray.train import stage as train_stage
from dpo_ray.train.checkpoint import oldest_step
from dpo_ray.train.task import AuditTask, TrainTask


@dataclass(frozen=True)
class Finished:
    """The artifacts of a finished run."""

    plan: Plan
    prepare: Artifact
    reference: Artifact | None  # of an objective without one
    schedule: Artifact
    train: Artifact
    evaluate: Artifact


def offline(recipe: Recipe, reporter: Reporter, *, verbose: bool = False) -> tuple[Finished, bool]:
    """Run what is not done; returns the artifacts and whether anything had to run.

    Raises:
        DpoRayError: one of its kinds, each with what, where and what to do. What was committed stays.
    """
    recipe = placed(recipe, verbose=verbose)
    plan = planning.make_plan(recipe)
    if plan.done:
        return opened(plan), False
    check_packages(plan.recipe)
    run_dir = run_storage(recipe)
    run_dir.check_writable()
    with Lease(run_dir) as lease, session(recipe, verbose=verbose):
        artifact_store(recipe).sweep(recipe.name)
        run_dir.write("recipe.yaml", recipe_yaml(recipe).encode())
        check_room(recipe, plan.to_run, plan.hardware.train_gpus, plan.hardware.engine_gpus, reporter.say)
        try:
            return _finished(Stages(plan, reporter, lease)), True  # its keys hold; what is done by now, the store says
        except AuditError as error:
            with_trainer = planning.make_plan(recipe)
            if with_trainer.numerics == plan.numerics:
                raise
            reporter.say(f"[bold yellow]audit[/bold yellow]: {escape(error.what)}")
            reporter.say(
                "reference.audit.on_drift is use_trainer: the trainer scores all again, and trains with that alone"
            )
            return _finished(Stages(with_trainer, reporter, lease)), True


def _finished(run: Stages) -> Finished:
    """Run the stages that are not done, in their order."""
    prepared = run.prepare()
    schedule_stage.check_usable(prepared, run.recipe.train.objective)
    referenced, scheduled, trained = run.side_by_side(prepared) or run.one_by_one(prepared)
    evaluated = run.evaluate(prepared, trained)
    return Finished(run.plan, prepared, referenced, scheduled, trained, evaluated)


def prepared(recipe: Recipe, reporter: Reporter, *, verbose: bool = False) -> tuple[Plan, Artifact]:
    """Run the stage `prepare` alone, if it is not done; returns the plan and the tokens artifact.

    Raises:
        DpoRayError: as `offline` does, except that a share of unsound rows over the limit does not stop a look at them.
    """
    recipe = placed(recipe, verbose=verbose)
    plan = planning.make_plan(recipe)
    if (done := planning.found(plan, "prepare")) is not None:
        return plan, done
    run_dir = run_storage(recipe)
    run_dir.check_writable()
    with Lease(run_dir) as lease, session(recipe, verbose=verbose):
        artifact_store(recipe).sweep(recipe.name)
        run = Stages(plan, reporter, lease)  # its keys hold; what is done by now, the store says
        try:
            return run.plan, run.prepare()
        except DataError:
            if (done := planning.found(run.plan, "prepare")) is None:
                raise
            return run.plan, done


def opened(plan: Plan) -> Finished:
    """Open the artifacts of a run that has finished.

    Raises:
        ArtifactError: a stage is not done.
    """
    artifacts: dict[str, Artifact] = {}
    for stage in plan.stages:
        artifact = planning.found(plan, stage)
        if artifact is None:
            raise ArtifactError(
                f"the stage `{stage}` is not done ({plan.stages[stage].reason})",
                where=plan.recipe.name,
                fix="`dpo-ray run` it first",
            )
        artifacts[stage] = artifact
    return Finished(plan, **{"reference": None, **artifacts})


def recipe_yaml(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class Stages:
    """The stages of one run under its lease, with a Ray to run on."""

    def __init__(self, plan: Plan, reporter: Reporter, lease: Lease) -> None:
        self.plan, self.recipe, self._reporter, self._lease = plan, plan.recipe, reporter, lease
        self.model_directory = model_directory(self.recipe.model)
        self._adapter_directory = adapter_directory(self.recipe.model)

    def prepare(self) -> Artifact:
        """Tokenize what is new, choose among all groups, and stop where too many rows are unsound."""
        tokens = planning.found(self.plan, "prepare") or self._prepare()
        check_quarantined(tokens, self.recipe.data.max_quarantined_fraction)
        return tokens

    def _prepare(self) -> Artifact:
        plan, store, provenance = self.plan, artifact_store(self.recipe), self._provenance("prepare")
        configs = {shard_key(config): config for config in plan.shard_configs}
        keys = [shard_key(config) for config in plan.shard_configs]
        task = PrepareTask(str(self.model_directory), plan.checked.template, self.recipe.data, plan.checked.filters)
        with self._reporter.stage("prepare", "rows") as bar:
            artifacts = prepare_stage.prepare_shards(
                dict(zip(keys, plan.checked.shards, strict=True)),
                store,
                self.recipe.name,
                task,
                lambda key: Provenance(SHARD_VERSION, {}, configs[key], planning.versions()),
                bar.advance,
                self.recipe.cluster.roles.prepare,
            )
            shards = [PreparedShard(s, artifacts[key]) for s, key in zip(plan.checked.shards, keys, strict=True)]
            tokens = prepare_stage.merge(
                shards,
                self.recipe.data,
                self._begin("prepare"),
                provenance,
                self.recipe.cluster.roles.prepare,
                with_mismatched=planning.needs_mismatched(self.recipe),
            )
        for split in splits(tokens):
            counts = [
                f"{tokens.manifest.rows[f'{split}/{what}']:,} {what.replace('_', ' ')}"
                for what in ("rows_in", "admitted", "quarantined", "duplicates")
            ]
            self._reporter.say(f"prepare, {split} data: {', '.join(counts)}")
        for broken in broken_shards(tokens):
            self._reporter.say(f"[bold yellow]prepare[/bold yellow]: {escape(broken)}")
        return tokens

    def one_by_one(self, prepared: Artifact) -> tuple[Artifact | None, Artifact, Artifact]:
        """Run `reference` (where the objective has one), `schedule` and `train`, each when the one before has ended."""
        referenced = self.reference(prepared) if "reference" in self.plan.stages else None
        scheduled = self.schedule(prepared, referenced)
        return referenced, scheduled, self.train(scheduled, prepared)

    def side_by_side(self, prepared: Artifact) -> tuple[Artifact, Artifact, Artifact] | None:
        """Run the three at the same time, where the recipe says so and they can be; else None, with nothing left of it."""
        if not overlap.is_wanted(self.plan):
            return None
        checkpoints = self._checkpoints(left_out=0)
        run = overlap.Run(
            self.plan,
            prepared,
            self._store(),
            self.reference_settings(),
            oldest_step(checkpoints),
            self._begin,
            self._provenance,
            self._lease.check,
        )
        try:
            return overlap.score_and_train(
                run,
                partial(self._reporter.stage, "reference", "groups", beside=True),
                lambda scheduled, wait: self.train(scheduled, prepared, wait),
            )
        except UnscorableError as error:
            self._reporter.say(f"[bold yellow]reference[/bold yellow]: {escape(str(error))}")
            self._reporter.say("without them the steps hold other groups: all is scored now, and training begins again")
            checkpoints.delete_tree()
            return None

    def reference(self, prepared: Artifact) -> Artifact:
        """Score what the store lacks; then join the store to the groups by key."""
        if (done := planning.found(self.plan, "reference")) is not None:
            return done
        recipe, provenance, rows = self.recipe, self._provenance("reference"), prepared.manifest.rows
        store = self._store()
        by_trainer = recipe.reference.engine == "trainer"
        groups = sum(rows[f"{split}/admitted"] for split in splits(prepared))
        with self._reporter.stage("reference", "groups", groups) as bar:
            account = reference_stage.score(
                prepared,
                store,
                self.reference_settings(),
                recipe.reference,
                recipe.train,
                self.plan.hardware.train_gpus if by_trainer else self.plan.hardware.engine_gpus,
                recipe.data.max_quarantined_fraction,
                bar.advance,
                bar.say,
            )
        return reference_stage.join(prepared, store, account, self._begin("reference"), provenance)

    def reference_settings(self, extra_tokens: int = 0) -> ScorerSettings:
        """Set up an engine with the reference model."""
        adapter = str(self._adapter_directory) if self._adapter_directory else None
        return replace(self.scorer_settings(str(self.model_directory), extra_tokens), adapter_dir=adapter)

    def _store(self) -> ReferenceStore:
        return ReferenceStore(reference_root(self.recipe), self.plan.model_digest, self.plan.numerics)

    def scorer_settings(self, model_dir: str, extra_tokens: int) -> ScorerSettings:
        """Set up an engine for this recipe's lengths; `extra_tokens` makes room for sampling."""
        r, hardware = self.recipe.reference, self.plan.hardware
        return ScorerSettings(
            engine=r.engine,
            model_dir=model_dir,
            dtype=hardware.dtype,
            device=hardware.device,
            max_length_tokens=self.recipe.data.max_length_tokens + extra_tokens,
            max_batched_tokens=r.max_batched_tokens,
            gpu_memory_fraction=r.gpu_memory_fraction,
            share_prompt=r.share_prompt,
        )

    def schedule(self, prepared: Artifact, referenced: Artifact | None) -> Artifact:
        """Order and pack the groups."""
        if (done := planning.found(self.plan, "schedule")) is not None:
            return done
        with self._reporter.stage("schedule", "steps") as bar:
            artifact = schedule_stage.run(
                prepared,
                referenced,
                self.recipe.train,
                self.recipe.seed,
                self._begin("schedule"),
                self._provenance("schedule"),
            )
            bar.advance(artifact.manifest.rows["train/steps"])
        return artifact

    def train(
        self,
        scheduled: Schedule,
        prepared: Artifact,
        before_commit: Callable[[], object] = lambda: None,
        *,
        trained_adapter: Path | None = None,
        moments: Artifact | None = None,
        keep_moments: bool = False,
    ) -> Artifact:
        """Train the policy, from the newest checkpoint where there is one.

        Args:
            trained_adapter: the LoRA adapter that training goes on with.
            moments: the training whose optimizer this one goes on with.
            keep_moments: in the artifact, for the next one.
        """
        recipe, plan = self.recipe, self.plan
        run_dir, steps = run_storage(recipe), scheduled.rows["train/steps"]
        checkpoints = self._checkpoints(prepared.rows["train/admitted"] - scheduled.rows["train/groups"])
        if (done := planning.found(self.plan, "train")) is not None:
            checkpoints.delete_tree()  # of a driver that was killed between its commit and this
            return done
        if (refused := artifact_store(recipe).find("train", plan.stages["train"].key)) is not None:
            self.check_drift(refused.manifest.figures["audit"])
        provenance = self._provenance("train")
        task = TrainTask(
            model=self._model_for_workers(),
            config=recipe.train,
            dtype=plan.hardware.dtype,
            template=plan.checked.template,
            schedule=scheduled,
            checkpoints=checkpoints,
            staging=self._begin("train"),
            inbox=scheduled.inbox if isinstance(scheduled, LiveSchedule) else start_inbox(),
            audit=self.audit_task(),
            seed=recipe.seed,
            identity=plan.resume_key,
            sources=sources_of(prepared, "train"),
            trained_adapter=str(trained_adapter) if trained_adapter else None,
            moments=moments,
            keep_moments=keep_moments,
        )
        with self._reporter.stage("train", "steps", steps) as bar, MetricsSinks(run_dir, recipe.trackers) as sinks:
            account = train_stage.run(task, plan.hardware.train_gpus, partial(follow, sinks, bar), bar.say)
        if account["audit"]:
            account["audit"] = self.check_drift(account["audit"])
        card = model_card(
            recipe.name,
            recipe.model,
            recipe.train,
            prepared.manifest.rows,
            account["steps"],
            account["final"],
            account["final_evaluation"],
            recipe_yaml(recipe),
            planning.versions(),
        )
        before_commit()
        self._lease.check()  # training takes hours: a driver that lost its run must not delete checkpoints
        return train_stage.commit(task, account, card, provenance)

    def _checkpoints(self, left_out: int) -> Storage:
        """Name the place of the checkpoints. Where groups have no reference, and so are left out, the steps are others."""
        key = self.plan.resume_key
        return run_storage(self.recipe).child("checkpoints", f"{key}-without-{left_out}" if left_out else key)

    def audit_task(self) -> AuditTask | None:
        """Say how the workers audit the reference before step 1; None where the recipe turns it off, or has no reference."""
        groups = self.recipe.reference.audit.groups if "reference" in self.plan.stages else 0
        return AuditTask(groups, measure, drift.rule(self.recipe, self.plan.hardware.dtype)) if groups else None

    def check_drift(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Judge what the audit measured; where it is over its limits, remember it, and stop or say so.

        Raises:
            AuditError: over the limits, and the recipe does not say to go on.
        """
        recipe, plan = self.recipe, self.plan
        judgement = drift.judged(measured, recipe, plan.hardware.dtype)
        if not judgement.passed:
            reference, trainer = plan.stages["reference"].key, planning.engine_version("trainer")
            drift.remember(artifact_store(recipe), reference, trainer, recipe.name, measured, planning.versions())
            check_drift(judgement, recipe.reference.audit, recipe.reference.engine)
            self._reporter.say(
                f"[bold yellow]audit[/bold yellow]: {judgement.summary()}; reference.audit.on_drift is warn, so training goes on"
            )
        return judgement.figures()

    def _model_for_workers(self) -> ModelConfig:
        """Name the model so that a process with another working directory, or on another node, finds it."""
        given = self.recipe.model
        found_anywhere = is_hub_name(given.path) or given.path.startswith(BUILTIN)
        places = {
            "path": given.path if found_anywhere else str(self.model_directory),
            "adapter": str(self._adapter_directory) if self._adapter_directory else None,
        }
        return given.model_copy(update=places)

    def evaluate(self, prepared: Artifact, trained: Artifact) -> Artifact:
        """Sample from policy and reference, and work out the figures."""
        if (done := planning.found(self.plan, "evaluate")) is not None:
            return done
        provenance, tokenizer = self._provenance("evaluate"), load_tokenizer(str(self.model_directory))
        context = context_tokens(self.model_directory)
        longest = context - self.recipe.evaluate.max_new_tokens if context is not None else None
        prompts = evaluate_stage.heldout_prompts(prepared, self.recipe.evaluate.sample_prompts, longest)
        with self._reporter.stage("evaluate", "prompts") as bar:
            comparison = self._compared(prepared, trained, prompts, tokenizer) if prompts else None
            bar.advance(len(prompts))
            is_synthetic = all(shard.kind == "synthetic" for shard in self.plan.checked.shards)
            return evaluate_stage.run(
                trained,
                comparison,
                synthetic.true_reward if is_synthetic else None,
                tokenizer,
                self._begin("evaluate"),
                provenance,
            )

    def _compared(self, prepared: Artifact, trained: Artifact, prompts: list[list[int]], tokenizer: Any) -> Comparison:
        e = self.recipe.evaluate
        policy_dir = self.policy_directory(trained)
        stops = evaluate_stage.end_tokens(prepared, tokenizer)
        sampling = Sampling(e.temperature, e.max_new_tokens, stops)
        policy = self.scorer_settings(str(policy_dir), e.max_new_tokens)
        if f"policy/{ADAPTER_CONFIG}" in trained.names():  # an adapter alone, of the model that is the reference
            base = self.scorer_settings(str(self.model_directory), e.max_new_tokens)
            policy = replace(base, adapter_dir=str(policy_dir))
        reference = self.reference_settings(e.max_new_tokens)
        ask = sampler_ask(self.recipe, self.plan.hardware.engine_gpus)
        return compare(policy, reference, prompts, sampling, self.recipe.seed, ask)

    def policy_directory(self, artifact: Artifact) -> Path:
        """Return a local directory with the policy that an artifact holds; from an object store it is copied first."""
        cache = Path.home() / ".cache" / "dpo_ray" / "artifacts" / f"{artifact.stage}-{artifact.key}"
        return artifact.local_dir("policy", cache)

    def _begin(self, stage: str) -> Staging:
        self._lease.check()
        return artifact_store(self.recipe).begin(stage, self.plan.stages[stage].key, self.recipe.name)

    def _provenance(self, stage: str) -> Provenance:
        planned = self.plan.stages[stage]
        return Provenance(planning.VERSIONS[stage], planned.inputs, planned.config, planning.versions())
