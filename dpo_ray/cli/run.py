"""The commands that run a recipe, and that write the report of a finished run again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from dpo_ray.errors import MemoryLimitError

from .options import Json, Overrides, RecipeFile, Tiny, Verbose, console, load

if TYPE_CHECKING:
    from dpo_ray.config.recipe import Recipe
    from dpo_ray.observe.progress import Reporter


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run every stage of a recipe that is not done yet. The last line of the output contains the main metrics.

    You can stop a run at any moment and by any means. The same command then continues from the committed work.
    """
    from dpo_ray.observe.progress import Reporter
    from dpo_ray.observe.ray_output import discard_ray_output, divert_ray_output
    from dpo_ray.run.attempt import attempt

    ray_output = None if verbose else divert_ray_output()
    reporter, loaded = Reporter(), load(recipe, overrides, tiny=tiny)
    with attempt(loaded, lambda line: reporter.say(escape(line)), ray_output):
        run_all = _run_stages if loaded.online is None else _run_rounds
        try:
            run_all(loaded, reporter, as_json=as_json, verbose=verbose)
        except MemoryLimitError as error:
            from .memory_advice import with_expectation

            raise with_expectation(loaded, error) from error
    discard_ray_output()


def _run_stages(recipe: Recipe, reporter: Reporter, *, as_json: bool, verbose: bool) -> None:
    from dpo_ray.report import summary
    from dpo_ray.run import offline

    finished, ran = offline.offline(recipe, reporter, verbose=verbose)
    if not ran:
        reporter.say("every stage is done: nothing to run")
    summary.write_report(finished)
    values = summary.figures(finished)
    if as_json:
        typer.echo(json.dumps(values))
        return
    summary.print_comparison(finished, console())
    typer.echo(summary.line(values))


def _run_rounds(recipe: Recipe, reporter: Reporter, *, as_json: bool, verbose: bool) -> None:
    from dpo_ray.online.rounds import online
    from dpo_ray.report import rounds_report, summary

    from . import rounds_view

    rounds, ran = online(recipe, reporter, verbose=verbose)
    if not ran:
        reporter.say("every round is done: nothing to run")
    rounds_report.write_page(rounds)
    values = rounds_report.figures(rounds)
    if as_json:
        typer.echo(json.dumps(values))
        return
    rounds_view.print_rounds(rounds_report.rounds_page(rounds), console())
    typer.echo(summary.line(values))


def report(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False) -> None:
    """Write the report of a finished run again, and print its path."""
    from dpo_ray.report import summary
    from dpo_ray.run import offline
    from dpo_ray.run.planning import make_plan

    run_plan = make_plan(load(recipe, overrides, tiny=tiny))
    if run_plan.recipe.online is not None:
        from dpo_ray.online.round_plan import derive
        from dpo_ray.report import rounds_report

        typer.echo(rounds_report.write_page(derive(run_plan)))
        return
    typer.echo(summary.write_report(offline.opened(run_plan)))
