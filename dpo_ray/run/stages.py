"""The stages of a run, one function each. A function returns its stage's artifact, and makes it if necessary."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.workers import start_inbox
from dpo_ray.config.model import ModelConfig, is_hub_name
from dpo_ray.data import stage as prepare_stage
from dpo_ray.data.first_pass import PrepareTask
from dpo_ray.data.keys import SHARD_VERSION, shard_key
from dpo_ray.data.schemas import sources_of, splits
from dpo_ray.data.second_pass import PreparedShard, broken_shards, check_quarantined, left_out_by_rules
from dpo_ray.data.tokenizing.chat import load_tokenizer, resolve_template
from dpo_ray.data.tokenizing.tokenize import stop_tokens
from dpo_ray.evaluate import stage as evaluate_stage
from dpo_ray.models.load import BUILTIN, context_tokens
from dpo_ray.observe.metrics import (
    AUDIT_DRIFT,
    AUDIT_MARGIN_ERROR,
    AUDIT_PASSED,
    DATA_ROWS,
    TRAIN_PROGRESS_TIME,
    TRAIN_STEPS_PLANNED,
)
from dpo_ray.observe.model_card import model_card
from dpo_ray.observe.progress import Bar
from dpo_ray.observe.recorder import record
from dpo_ray.observe.sinks import MetricsSinks, follow
from dpo_ray.reference import audit_record
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.audit import measure
from dpo_ray.reference.audit_limits import Judgement, check_drift
from dpo_ray.schedule import stage as schedule_stage
from dpo_ray.schedule.files import Schedule
from dpo_ray.schedule.live import LiveSchedule
from dpo_ray.train import stage as train_stage
from dpo_ray.train.task import AuditTask, TrainTask

from . import planning
from .context import RunContext, recipe_yaml
from .samples import compare_models

FEW_STEPS = 10  # a training with fewer steps changes little, so a line in the log warns


def prepare(run: RunContext) -> Artifact:
    """Run the stage `prepare`: tokenize shards that are new, apply the rules for all rows, and commit the result.

    Raises:
        DataError: more rows are invalid than `data.max_quarantined_fraction` allows.
    """
    tokens = run.find("prepare") or _prepare(run)
    for split in splits(tokens):
        for outcome, rows in _rows(tokens, split).items():
            record(DATA_ROWS, rows, split=split, outcome=outcome)
    check_quarantined(tokens, run.recipe.data.max_quarantined_fraction)
    return tokens


def _prepare(run: RunContext) -> Artifact:
    plan, data, role = run.plan, run.recipe.data, run.recipe.cluster.roles.prepare
    provenance = run.provenance("prepare")
    configs = {shard_key(config): config for config in plan.shard_configs}
    keys = [shard_key(config) for config in plan.shard_configs]
    task = PrepareTask(str(run.model_directory), plan.checked.template, data, plan.checked.filters)
    with run.reporter.stage("prepare", "rows") as bar:
        artifacts = prepare_stage.prepare_shards(
            dict(zip(keys, plan.checked.shards, strict=True)),
            run.artifacts,
            run.recipe.name,
            task,
            lambda key: run.provenance_of(SHARD_VERSION, {}, configs[key]),
            bar.advance,
            role,
        )
        shards = [PreparedShard(s, artifacts[key]) for s, key in zip(plan.checked.shards, keys, strict=True)]
        with_mismatched = planning.needs_mismatched(run.recipe)
        staging = run.begin("prepare")
        tokens = prepare_stage.merge(shards, data, staging, provenance, role, with_mismatched=with_mismatched)
    for split in splits(tokens):
        rows = _rows(tokens, split)
        run.reporter.say(
            f"prepare, {split} data: {tokens.manifest.rows[f'{split}/rows_in']:,} rows in, {rows['admitted']:,} admitted, "
            f"{rows['quarantined']:,} quarantined, {rows['left_out']:,} left out by rules, {rows['duplicate']:,} duplicates"
        )
    for broken in broken_shards(tokens):
        run.reporter.say(f"[bold yellow]prepare[/bold yellow]: {escape(broken)}")
    return tokens


def _rows(tokens: Artifact, split: str) -> dict[str, int]:
    """Count the rows of a split by outcome."""
    admitted, quarantined, duplicates = (
        tokens.manifest.rows[f"{split}/{what}"] for what in ("admitted", "quarantined", "duplicates")
    )
    left_out = left_out_by_rules(tokens, split)
    return {
        "admitted": admitted,
        "quarantined": quarantined - left_out,
        "left_out": left_out,
        "duplicate": duplicates,
    }


def reference(run: RunContext, tokens: Artifact) -> Artifact:
    """Run the stage `reference`: compute the missing reference log-probs, and commit the log-probs of all groups."""
    if (done := run.find("reference")) is not None:
        return done
    recipe, hardware, provenance = run.recipe, run.plan.hardware, run.provenance("reference")
    groups = sum(tokens.manifest.rows[f"{split}/admitted"] for split in splits(tokens))
    with run.reporter.stage("reference", "groups", groups) as bar:
        tally = reference_stage.score(
            tokens,
            run.reference_store,
            run.scorer_settings(),
            recipe.reference,
            recipe.train,
            hardware.worker if recipe.reference.engine == "trainer" else hardware.engine,
            recipe.data.max_quarantined_fraction,
            bar.advance,
            bar.say,
        )
    return reference_stage.join(tokens, run.reference_store, tally, run.begin("reference"), provenance)


def schedule(run: RunContext, tokens: Artifact, referenced: Artifact | None) -> Artifact:
    """Run the stage `schedule`: assign groups to steps in random order, and pack them into micro-batches."""
    if (done := run.find("schedule")) is not None:
        return done
    recipe, staging, provenance = run.recipe, run.begin("schedule"), run.provenance("schedule")
    with run.reporter.stage("schedule", "steps") as bar:
        artifact = schedule_stage.run(tokens, referenced, recipe.train, recipe.seed, staging, provenance)
        bar.advance(artifact.manifest.rows["train/steps"])
    return artifact


def train(
    run: RunContext,
    scheduled: Schedule,
    tokens: Artifact,
    before_commit: Callable[[], object] = lambda: None,
    *,
    trained_adapter: Path | None = None,
    moments: Artifact | None = None,
    keep_moments: bool = False,
) -> Artifact:
    """Run the stage `train`: train the policy, from the newest checkpoint if there is one.

    Args:
        scheduled: the steps of training. Training waits for steps that are still being written.
        tokens: the artifact with the preference groups that the steps contain.
        before_commit: called when training has ended, before the artifact is committed.
        trained_adapter: a LoRA adapter with which training starts.
        moments: an artifact of the stage `train` that contains the optimizer's state with which training starts.
        keep_moments: keep the optimizer's state in the artifact, for the training of a later round.

    Raises:
        AuditError: the audit of the reference log-probs exceeds its limits, and the recipe does not allow training to
            continue.
        TrainError, StoppedError: raised by the workers.
    """
    recipe, plan = run.recipe, run.plan
    places = checkpoints(run, left_out=tokens.rows["train/admitted"] - scheduled.rows["train/groups"])
    if (done := run.find("train")) is not None:
        places.delete_tree()  # left by a driver that was killed between its commit and this deletion
        return done
    if (refused := run.artifacts.find("train", plan.stages["train"].key)) is not None:
        judge_audit(run, refused.manifest.figures["audit"])
    provenance, steps = run.provenance("train"), scheduled.rows["train/steps"]
    _announce_steps(run, steps)
    task = TrainTask(
        model=_model_for_workers(run),
        config=recipe.train,
        dtype=plan.hardware.dtype,
        template=plan.checked.template,
        schedule=scheduled,
        checkpoints=places,
        staging=run.begin("train"),
        inbox=scheduled.inbox if isinstance(scheduled, LiveSchedule) else start_inbox(),
        audit=_audit_task(run),
        cpus=plan.hardware.worker.cpus,
        seed=recipe.seed,
        identity=plan.resume_key,
        sources=sources_of(tokens, "train"),
        trained_adapter=str(trained_adapter) if trained_adapter else None,
        moments=moments,
        keep_moments=keep_moments,
    )
    bar_of_steps = run.reporter.stage("train", "steps", steps)
    with bar_of_steps as bar, MetricsSinks(run.directory, recipe.trackers, bar.say) as sinks:
        on_row = partial(_follow, run, sinks, bar)
        result = train_stage.run(task, plan.hardware.worker, on_row, bar.say, run.lease.check)
    if result["audit"]:
        result["audit"] = judge_audit(run, result["audit"])
    card = _card(run, tokens, result)
    before_commit()
    return train_stage.commit(task, result, card, provenance)


def _card(run: RunContext, tokens: Artifact, result: dict[str, Any]) -> str:
    """Return the text of the policy's model card, from the result of training."""
    recipe = run.recipe
    return model_card(
        recipe.name,
        recipe.model,
        recipe.train,
        tokens.manifest.rows,
        result["steps"],
        result["final"],
        result["final_evaluation"],
        recipe_yaml(recipe),
        planning.versions(),
    )


def _follow(run: RunContext, sinks: MetricsSinks, bar: Bar, row: dict[str, Any]) -> None:
    """Handle one row from the training workers, and record when it came. The first one has the figures of the audit."""
    record(TRAIN_PROGRESS_TIME, time.time())
    if row.get("audit"):
        _record_audit(audit_record.judged(row["audit"], run.recipe, run.plan.hardware.dtype))
    follow(sinks, bar, row)


def _record_audit(judgement: Judgement) -> None:
    figures = judgement.figures()
    record(AUDIT_DRIFT, figures["mean_token_drift"], statistic="mean")
    record(AUDIT_DRIFT, figures["max_token_drift"], statistic="max")
    record(AUDIT_MARGIN_ERROR, figures["margin_error_nats"])
    record(AUDIT_PASSED, judgement.passed)


def _announce_steps(run: RunContext, steps: int) -> None:
    """Record the number of steps, and warn if there are few."""
    record(TRAIN_STEPS_PLANNED, steps)
    record(TRAIN_PROGRESS_TIME, time.time())
    if steps < FEW_STEPS:
        run.reporter.say(
            f"[bold yellow]train[/bold yellow]: there {'is' if steps == 1 else 'are'} only {steps} optimizer "
            f"step{'s' if steps > 1 else ''} of up to {run.recipe.train.groups_per_step} groups; for more steps, set a "
            "lower train.groups_per_step or more train.epochs"
        )


def checkpoints(run: RunContext, left_out: int) -> Storage:
    """Return the directory of the training checkpoints.

    The directory depends on `left_out`, the number of groups without reference log-probs, because the steps of training
    do not contain these groups.
    """
    key = run.plan.resume_key
    return run.directory.child("checkpoints", f"{key}-without-{left_out}" if left_out else key)


def _audit_task(run: RunContext) -> AuditTask | None:
    """Return the audit that the workers run before step 1; None if it is off or there are no reference log-probs."""
    groups = run.recipe.reference.audit.groups if "reference" in run.plan.stages else 0
    return AuditTask(groups, measure, audit_record.rule(run.recipe, run.plan.hardware.dtype)) if groups else None


def judge_audit(run: RunContext, measured: dict[str, Any]) -> dict[str, Any]:
    """Compare the measurements of the audit with the recipe's limits; return them with the result.

    If a limit is exceeded, record the measurements for later plans. Then raise an error, or report that training
    continues.

    Raises:
        AuditError: the measurements exceed a limit, and the recipe does not allow training to continue.
    """
    recipe, plan = run.recipe, run.plan
    judgement = audit_record.judged(measured, recipe, plan.hardware.dtype)
    _record_audit(judgement)
    if not judgement.passed:
        reference_key, trainer = plan.stages["reference"].key, planning.engine_version("trainer")
        audit_record.remember(run.artifacts, reference_key, trainer, recipe.name, measured, planning.versions())
        check_drift(judgement, recipe.reference.audit, recipe.reference.engine)
        run.reporter.say(
            f"[bold yellow]audit[/bold yellow]: {judgement.summary()}; reference.audit.on_drift is warn, so training continues"
        )
    return judgement.figures()


def _model_for_workers(run: RunContext) -> ModelConfig:
    """Return the model's configuration with absolute paths, for processes in other directories and on other nodes."""
    model = run.recipe.model
    is_found_anywhere = is_hub_name(model.path) or model.path.startswith(BUILTIN)
    places = {
        "path": model.path if is_found_anywhere else str(run.model_directory),
        "adapter": str(run.adapter_directory) if run.adapter_directory else None,
    }
    return model.model_copy(update=places)


def evaluate(run: RunContext, tokens: Artifact, trained: Artifact) -> Artifact:
    """Run the stage `evaluate`: compare completions sampled from policy and reference, and compute all metrics."""
    if (done := run.find("evaluate")) is not None:
        return done
    config, provenance = run.recipe.evaluate, run.provenance("evaluate")
    tokenizer = load_tokenizer(str(run.model_directory))
    context = context_tokens(run.model_directory)
    longest = context - config.max_new_tokens if context is not None else None
    prompts = evaluate_stage.heldout_prompts(tokens, config.sample_prompts, longest)
    data = run.recipe.data
    if not data.eval:
        run.reporter.say("evaluate: nothing is measured or sampled, as there is no held-out data (data.eval)")
    stops = stop_tokens(tokenizer, resolve_template(data.chat_template, tokenizer), data, run.model_directory)
    with run.reporter.stage("evaluate", "prompts", len(prompts)) as bar:
        comparison = compare_models(run, trained, prompts, stops, bar) if prompts else None
        true_reward = run.plan.true_reward
        return evaluate_stage.run(trained, comparison, true_reward, tokenizer, run.begin("evaluate"), provenance)
