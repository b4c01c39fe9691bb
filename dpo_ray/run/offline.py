"""An offline run: prepare -> reference -> schedule -> train -> evaluate. A stage is skipped if its artifact exists."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.cluster.placement import check_room, resolve_hardware
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ArtifactError, AuditError, DataError
from dpo_ray.observe.progress import Reporter
from dpo_ray.schedule.usable import check_usable

from . import planning, stages
from .context import RunContext, open_run, record_recipe
from .planning import Plan
from .start_checks import check_packages, check_start
from .streaming import score_while_training


@dataclass(frozen=True)
class Finished:
    """The artifacts of a finished run."""

    plan: Plan
    prepare: Artifact
    reference: Artifact | None  # None: the objective uses no reference
    schedule: Artifact
    train: Artifact
    evaluate: Artifact


def run_stages(run: RunContext) -> Finished:
    """Run the stages that are not done, in order; return the artifacts of all stages."""
    tokens = stages.prepare(run)
    check_usable(tokens, run.recipe.train.objective)
    reference, schedule, policy = score_while_training(run, tokens) or one_after_the_other(run, tokens)
    return Finished(run.plan, tokens, reference, schedule, policy, stages.evaluate(run, tokens, policy))


def one_after_the_other(run: RunContext, tokens: Artifact) -> tuple[Artifact | None, Artifact, Artifact]:
    """Run the stages `reference` (if the objective needs it), `schedule` and `train` in turn; return their artifacts."""
    reference = stages.reference(run, tokens) if "reference" in run.plan.stages else None
    schedule = stages.schedule(run, tokens, reference)
    return reference, schedule, stages.train(run, schedule, tokens)


def offline(recipe: Recipe, reporter: Reporter, *, verbose: bool = False) -> tuple[Finished, bool]:
    """Run the stages of a recipe that are not done; return all artifacts, and whether anything had to run.

    Raises:
        DpoRayError: a subclass that says what is wrong, where, and what to do. Committed work is kept.
    """
    recipe = resolve_hardware(recipe, verbose=verbose)
    plan = planning.make_plan(recipe)
    if plan.done:
        return opened(plan), False
    check_packages(plan.recipe)
    check_start(plan.recipe, plan.checked, plan.to_run)
    with open_run(recipe, plan, reporter, verbose=verbose) as run:
        record_recipe(run, recipe)
        check_room(recipe, plan.to_run, plan.hardware.worker.gpus, plan.hardware.engine.gpus, reporter.say)
        try:
            return run_stages(run), True  # the plan's keys stay valid; stages look up again what is done
        except AuditError as error:
            with_trainer = planning.make_plan(recipe)
            if with_trainer.numerics == plan.numerics:
                raise
            reporter.say(f"[bold yellow]audit[/bold yellow]: {escape(error.what)}")
            reporter.say(
                "reference.audit.on_drift is use_trainer: the trainer scores all groups again, and only its scores are used"
            )
            return run_stages(RunContext(with_trainer, reporter, run.lease)), True


def prepared(recipe: Recipe, reporter: Reporter, *, verbose: bool = False) -> tuple[Plan, Artifact]:
    """Run only the stage `prepare`, if it is not done; return the plan and the artifact with the tokens.

    Raises:
        DpoRayError: as for `offline`, except that too many invalid rows are no error, so that they can be inspected.
    """
    recipe = resolve_hardware(recipe, verbose=verbose)
    plan = planning.make_plan(recipe)
    if (done := planning.found(plan, "prepare")) is not None:
        return plan, done
    with open_run(recipe, plan, reporter, verbose=verbose) as run:  # the plan's keys stay valid
        try:
            return plan, stages.prepare(run)
        except DataError:
            if (done := run.find("prepare")) is None:
                raise
            return plan, done


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
                fix="finish it with `dpo-ray run` first",
            )
        artifacts[stage] = artifact
    return Finished(plan, **{"reference": None, **artifacts})
