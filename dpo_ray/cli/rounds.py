"""The command that shows the rounds of an online run."""

from __future__ import annotations

import json

import typer

from dpo_ray.errors import ConfigError

from .options import Json, Overrides, RecipeFile, Tiny, console, load


def rounds(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False, as_json: Json = False) -> None:
    """Show every round of an online run: its state, its metrics, and whether its policy was promoted. Starts nothing.

    To continue a finished run with further rounds, increase `online.rounds` and use `dpo-ray run`.
    """
    from dpo_ray.online.round_plan import derive
    from dpo_ray.report import rounds_report
    from dpo_ray.run.planning import make_plan

    from . import rounds_view

    loaded = load(recipe, overrides, tiny=tiny)
    if loaded.online is None:
        raise ConfigError(
            "the recipe has no section `online`, so it has no rounds",
            where=str(recipe),
            fix="use `dpo-ray plan`, which shows the stages of the recipe",
        )
    page = rounds_report.rounds_page(derive(make_plan(loaded)))
    if as_json:
        typer.echo(json.dumps(rounds_view.figures(page)))
    else:
        rounds_view.print_rounds(page, console())
