"""The command that shows the data of a recipe before training on it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .options import Json, Overrides, RecipeFile, Tiny, Verbose, console, load

inspect = typer.Typer(help="Inspect the data of a recipe before training on it.", no_args_is_help=True)


@inspect.command("data")
def inspect_data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    sample: Annotated[
        int, typer.Option(min=0, max=100, help="Number of preference groups to show as the model sees them.")
    ] = 3,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show which rows are used or left out and why, their lengths, and what the model sees. Also write data.html.

    Runs the stage `prepare` first if it is not done yet. Starts no engine.
    """
    from dpo_ray.observe.progress import Reporter
    from dpo_ray.observe.ray_output import discard_ray_output, divert_ray_output
    from dpo_ray.report import data_report
    from dpo_ray.run import offline

    from . import data_view

    if not verbose:
        divert_ray_output()
    made, tokens = offline.prepared(load(recipe, overrides, tiny=tiny), Reporter(), verbose=verbose)
    page = data_report.data_page(made, tokens, sample)
    place = data_report.write_data_page(made, tokens, page)
    if as_json:
        typer.echo(json.dumps(data_view.figures(page, place)))
    else:
        data_view.print_account(page, made.recipe.name, place, console())
    discard_ray_output()
