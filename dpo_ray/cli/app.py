"""The command line. Each command is a few lines that call one function."""

from __future__ import annotations

import json
import logging
import signal
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpo_ray.errors import EXIT_CODES, ConfigError, DpoRayError, StoppedError

from . import jobs
from .kubernetes import kubernetes

if TYPE_CHECKING:
    from dpo_ray.artifacts.storage import Storage
    from dpo_ray.config.recipe import Recipe
    from dpo_ray.observe.progress import Reporter
    from dpo_ray.run.planning import Plan

_MEANINGS = EXIT_CODES | {1: "A bug in dpo-ray itself: the traceback shows where"}
_CODES = "\n".join(f"* {code}: {meaning.rstrip('.')}" for code, meaning in sorted(_MEANINGS.items()))
app = typer.Typer(
    help="Align a language model with preference data (DPO and its family), on Ray.\n\nA recipe is a YAML file; each of its values can be "
    "overridden on the command line as key.path=value. Begin with `dpo-ray init` and `dpo-ray run`.",
    epilog="Exit codes:\n\n" + _CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values that override those of the recipe.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Tiny = Annotated[
    bool,
    typer.Option(
        "--tiny",
        help="Run a miniature of the recipe: a tiny random model, synthetic data, 3 steps, this machine, no network.",
    ),
]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and its workers log.")] = False,
) -> None:
    """Run every stage of a recipe that is not done yet. The last line of the output contains the main figures.

    A run can be stopped at any moment and by any means: the same command goes on from what was committed.
    """
    from dpo_ray.observe.progress import Reporter
    from dpo_ray.report import summary
    from dpo_ray.run import offline

    reporter, loaded = Reporter(), _loaded(recipe, overrides, tiny=tiny)
    if loaded.online is not None:
        _run_rounds(loaded, reporter, as_json=as_json, verbose=verbose)
        return
    finished, ran = offline.offline(loaded, reporter, verbose=verbose)
    if not ran:
        reporter.say("every stage is done: nothing to run")
    summary.write_report(finished)
    values = summary.figures(finished)
    if as_json:
        typer.echo(json.dumps(values))
        return
    summary.print_comparison(finished, _console())
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
    rounds_view.print_rounds(rounds_report.rounds_page(rounds), _console())
    typer.echo(summary.line(values))


@app.command()
def rounds(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False, as_json: Json = False) -> None:
    """Show every round of an online run: its state, its figures, and whether its policy was promoted. Starts nothing.

    A finished run continues when `online.rounds` is increased.
    """
    from dpo_ray.online.round_plan import derive
    from dpo_ray.report import rounds_report
    from dpo_ray.run.planning import make_plan

    from . import rounds_view

    loaded = _loaded(recipe, overrides, tiny=tiny)
    if loaded.online is None:
        raise ConfigError(
            "the recipe has no section `online`, so it has no rounds",
            where=str(recipe),
            fix="`dpo-ray plan` shows its stages",
        )
    page = rounds_report.rounds_page(derive(make_plan(loaded)))
    if as_json:
        typer.echo(json.dumps(rounds_view.figures(page)))
    else:
        rounds_view.print_rounds(page, _console())


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tiny: Tiny = False,
    as_json: Json = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NODESxGPUSxGPU", help="Also show what the recipe needs on such a cluster: 4x8xH100."),
    ] = None,
) -> None:
    """Show which stages are done, which would run, and why. Starts nothing and writes nothing."""
    from dpo_ray.run.planning import make_plan

    from . import capacity_view

    loaded = _loaded(recipe, overrides, tiny=tiny)
    run_plan, obstacle = (make_plan(loaded), "") if cluster is None else capacity_view.plan_if_possible(loaded)
    capacity = None if cluster is None else capacity_view.capacity_of(loaded, cluster, run_plan)
    stages = {"name": loaded.name, "stages": None, "reason": obstacle} if run_plan is None else _stages(run_plan)
    if as_json:
        typer.echo(json.dumps(stages if capacity is None else stages | {"capacity": capacity_view.figures(capacity)}))
        return
    console = _console()
    if run_plan is None:
        typer.echo(f"stages: cannot be determined on this machine: {obstacle}")
    else:
        _print_stages(stages, console)
    if capacity is not None:
        capacity_view.print_capacity(capacity, console)


def _stages(made: Plan) -> dict[str, Any]:
    stages = [(s.stage, s) for s in made.stages.values()]
    if made.recipe.online is not None:
        from dpo_ray.online.round_plan import derive

        begun = [(f"round {r.number}: {name}", s) for r in derive(made).rounds for name, s in r.stages.items()]
        stages = [*stages[:1], *begun]  # `prepare`, then the stages of each round
    rows = [{"stage": name, "key": s.key, "state": s.state, "reason": s.reason} for name, s in stages]
    return {"name": made.recipe.name, "device": made.hardware.device, "dtype": made.hardware.dtype, "stages": rows}


def _print_stages(stages: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{stages['name']}: on {stages['device']}, {stages['dtype']}", title_justify="left")
    for name in ("stage", "state", "reason", "key"):
        table.add_column(name, no_wrap=name != "reason")
    for row in stages["stages"]:
        colour = {"done": "green", "stale": "yellow", "missing": "cyan"}[row["state"]]
        table.add_row(row["stage"], f"[{colour}]{row['state']}[/{colour}]", row["reason"], row["key"])
    console.print(table)


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False, as_json: Json = False) -> None:
    """Check a recipe, and all files and models it names that are accessible from this machine. Starts nothing."""
    from dpo_ray.run.preflight import preflight

    loaded = _loaded(recipe, overrides, tiny=tiny)
    checked = preflight(loaded)
    if as_json:
        typer.echo(loaded.model_dump_json())
    else:
        typer.echo(f"{recipe}: valid; {len(checked.shards)} data shards")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from dpo_ray.config.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented starter recipe that can be run without changes."""
    text = resources.files("dpo_ray.config").joinpath("starter.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(
            "a file of this name already exists", where=str(path), fix="choose another file name"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix="choose a file in a directory that you can write to",
        ) from None
    typer.echo(f"wrote {path}; next: dpo-ray run {path}")


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write the report of a finished run again, and print its path."""
    from dpo_ray.config.load import load_recipe
    from dpo_ray.report import summary
    from dpo_ray.run import offline
    from dpo_ray.run.planning import make_plan

    run_plan = make_plan(load_recipe(recipe, overrides or []))
    if run_plan.recipe.online is not None:
        from dpo_ray.online.round_plan import derive
        from dpo_ray.report import rounds_report

        typer.echo(rounds_report.write_page(derive(run_plan)))
        return
    typer.echo(summary.write_report(offline.opened(run_plan)))


inspect = typer.Typer(help="Inspect the data of a recipe before training on it.", no_args_is_help=True)
app.add_typer(inspect, name="inspect")


@inspect.command("data")
def inspect_data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=0, max=100, help="Number of groups to show as the model sees them.")] = 3,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and its workers log.")] = False,
) -> None:
    """Show which rows were read or left out and why, their lengths, and what the model sees; also write data.html.

    Runs the stage `prepare` if it is not done yet. Starts no engine.
    """
    from dpo_ray.config.load import load_recipe
    from dpo_ray.observe.progress import Reporter
    from dpo_ray.report import data_report
    from dpo_ray.run import offline

    from . import data_view

    made, tokens = offline.prepared(load_recipe(recipe, overrides or []), Reporter(), verbose=verbose)
    page = data_report.data_page(made, tokens, sample)
    place = data_report.write_data_page(made, tokens, page)
    if as_json:
        typer.echo(json.dumps(data_view.figures(page, place)))
    else:
        data_view.print_account(page, made.recipe.name, place, _console())


store = typer.Typer(
    help="Maintain a reference store, which runs share: show its size, verify its files, delete what is not needed.",
    no_args_is_help=True,
)
app.add_typer(store, name="store")

StorePlace = Annotated[
    str, typer.Argument(metavar="STORE", help="The store's directory or URI, or a recipe (*.yaml) that uses it.")
]


@store.command("stats")
def store_stats(place: StorePlace, as_json: Json = False) -> None:
    """Show what a store holds for each model and way of computing: sequences, tokens, bytes, damage, last use.

    Reads only the footers of the files. The name of a partition begins with the digest of its model.
    """
    from dpo_ray.reference.store import care

    from . import store_view

    root = _store_root(place)
    partitions = care.stats(root)
    if as_json:
        typer.echo(json.dumps([vars(partition) for partition in partitions]))
    else:
        store_view.print_stats(root, partitions, _console())


@store.command("verify")
def store_verify(place: StorePlace, as_json: Json = False) -> None:
    """Read a whole store and list all faults: damaged files, values that are not log-probs, contradictions.

    Exits with code 4 if there is a fault. `dpo-ray store gc` removes it, and the next run scores what is missing.
    """
    from dpo_ray.errors import ArtifactError
    from dpo_ray.reference.store import care

    from . import store_view

    root = _store_root(place)
    faults = list(care.verify(root))
    if as_json:
        typer.echo(json.dumps([vars(fault) for fault in faults]))
    elif faults:
        store_view.print_faults(root, faults, _console())
    if faults:
        fix = "`dpo-ray store gc` removes what is damaged; the next run scores what is then missing"
        what = f"{len(faults):,} {'fault' if len(faults) == 1 else 'faults'} in the reference store"
        raise ArtifactError(what, where=root.uri, fix=fix)
    if not as_json:
        typer.echo(f"{root.uri}: no faults found")


@store.command("gc")
def store_gc(
    place: StorePlace,
    unused_days: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Also delete partitions that no run has used for N days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; only show what would be done.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also clean up partitions that were used in the last hour.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Clean up a store: delete damaged and leftover files, merge small segments and, if asked, delete unused partitions.

    Partitions that were used in the last hour are left alone, because a run may still be writing to them. No intact
    data is lost, and what was damaged is scored again by the next run that needs it.
    """
    from dpo_ray.reference.store.gc import clear

    from . import store_view

    done = clear(_store_root(place), unused_days=unused_days, force=force, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps([vars(cleared) for cleared in done]))
    elif done:
        store_view.print_cleared(done, dry_run, _console())
    else:
        typer.echo("nothing to clear")


def _store_root(place: str) -> Storage:
    """Open the store at an address, or the one that a recipe uses, which may still be empty."""
    from dpo_ray.artifacts.places import reference_root
    from dpo_ray.artifacts.storage import Storage
    from dpo_ray.config.load import load_recipe
    from dpo_ray.reference.store.care import partitions

    if place.endswith((".yaml", ".yml")):
        return reference_root(load_recipe(Path(place), []))
    root = Storage(place)
    if not partitions(root):
        fix = "name the directory that holds the partitions, such as runs/reference-store, or a recipe that uses it"
        raise ConfigError("there is no reference store here", where=root.uri, fix=fix)
    return root


@app.command()
def doctor(
    output: Annotated[str, typer.Option(help="The output to check for write access: a directory or a URI.")] = "runs",
    as_json: Json = False,
) -> None:
    """Check versions, devices, Ray and storage; show what will not work and how to fix it."""
    from .doctor import examine

    findings = examine(output)
    broken = any(f.state == "broken" for f in findings)
    if as_json:
        typer.echo(json.dumps([vars(f) for f in findings]))
    else:
        table = Table("", "what", "found", "how to fix it")
        for f in findings:
            mark = {"ok": "[green]ok[/green]", "warning": "[yellow]look[/yellow]", "broken": "[red]broken[/red]"}[
                f.state
            ]
            table.add_row(mark, f.what, f.found, f.fix)
        _console().print(table)
    raise typer.Exit(9 if broken else 0)


app.add_typer(kubernetes, name="kubernetes")
app.registered_commands += jobs.jobs.registered_commands


def _loaded(file: Path, overrides: list[str] | None, *, tiny: bool) -> Recipe:
    """Load a recipe, as a miniature if `tiny`; the values that make it small take precedence over overrides."""
    from dpo_ray.config.load import load_recipe

    recipe = load_recipe(file, overrides or [])
    if not tiny:
        return recipe
    from dpo_ray.run.tiny import tiny_recipe

    return tiny_recipe(recipe)


def _console() -> Console:
    """Open a console on standard output; if that is not a terminal, it is wide enough that no cell is cut off."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; errors of dpo-ray are printed without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code: Any = app(arguments, standalone_mode=False, prog_name="dpo-ray")
    except DpoRayError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except SystemExit as stopped:
        if (
            stopped.code != signal.SIGTERM
        ):  # Ray exits with it on SIGTERM; during training SIGTERM raises a StoppedError instead
            raise
        Console(stderr=True).print("stopped; the same command goes on from what was committed", style="yellow")
        sys.exit(StoppedError.exit_code)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from what was committed", style="yellow")
        sys.exit(130)
    except typer.TyperException as error:
        if message := error.format_message():  # empty if the help was printed because there were no arguments
            Console(stderr=True, soft_wrap=True).print(f"error: {message}", style="red", highlight=False, markup=False)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
