"""The command that shows which stages would run, and what they need on a cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .options import Json, Overrides, RecipeFile, Tiny, console, load

if TYPE_CHECKING:
    from dpo_ray.run.planning import Plan


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    as_json: Json = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NODESxGPUSxGPU", help="Also show what the recipe needs on a cluster such as 4x8xH100."),
    ] = None,
) -> None:
    """Show which stages are done, which stages would run, and why. Starts nothing and writes nothing."""
    from dpo_ray.run.planning import make_plan

    from . import capacity_view

    loaded = load(recipe, overrides, tiny=tiny)
    run_plan, obstacle = (make_plan(loaded), "") if cluster is None else capacity_view.plan_if_possible(loaded)
    if cluster is None and run_plan is not None:
        _check(run_plan)
    capacity = None if cluster is None else capacity_view.capacity_of(loaded, cluster, run_plan)
    stages = {"name": loaded.name, "stages": None, "reason": obstacle} if run_plan is None else _stages(run_plan)
    if as_json:
        typer.echo(json.dumps(stages if capacity is None else stages | {"capacity": capacity_view.figures(capacity)}))
        return
    output = console()
    if run_plan is None:
        typer.echo(f"stages: cannot be determined on this machine: {obstacle}")
    else:
        _print_stages(stages, output)
    if capacity is not None:
        capacity_view.print_capacity(capacity, output)


def _check(made: Plan) -> None:
    """Check the packages, memory, ... that the stages to run need, as `run` does before it starts them."""
    from dpo_ray.run.start_checks import check_start

    check_start(made.recipe, made.checked, made.to_run if made.recipe.online is None else None)
    if made.recipe.online is not None:
        from dpo_ray.online.checks import check_rounds

        check_rounds(made.recipe, made.checked)


def _stages(made: Plan) -> dict[str, Any]:
    stages = [(s.stage, s) for s in made.stages.values()]
    if made.recipe.online is not None:
        from dpo_ray.online.round_plan import derive

        begun = [(f"round {r.number}: {name}", s) for r in derive(made).rounds for name, s in r.stages.items()]
        stages = [*stages[:1], *begun]  # `prepare`, then the stages of each round
    rows = [{"stage": name, "key": s.key, "state": s.state, "reason": s.reason} for name, s in stages]
    return {"name": made.recipe.name, "device": made.hardware.device, "dtype": made.hardware.dtype, "stages": rows}


def _print_stages(stages: dict[str, Any], output: Console) -> None:
    table = Table(title=f"{stages['name']}: on {stages['device']}, {stages['dtype']}", title_justify="left")
    for name in ("stage", "state", "reason", "key"):
        table.add_column(name, no_wrap=name != "reason")
    for row in stages["stages"]:
        colour = {"done": "green", "stale": "yellow", "missing": "cyan"}[row["state"]]
        table.add_row(row["stage"], f"[{colour}]{row['state']}[/{colour}]", row["reason"], row["key"])
    output.print(table)
