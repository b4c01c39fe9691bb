"""The commands that maintain a reference store, in which runs share the log-probs of reference models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_ray.errors import ConfigError

from .options import Json, console

if TYPE_CHECKING:
    from dpo_ray.artifacts.storage import Storage

store = typer.Typer(
    help="Maintain a reference store, in which runs share the log-probs of reference models: show its size, verify its files, "
    "delete what is not needed.",
    no_args_is_help=True,
)

StorePlace = Annotated[
    str, typer.Argument(metavar="STORE", help="The store's directory or URI, or a recipe (*.yaml) that uses the store.")
]


@store.command("stats")
def store_stats(place: StorePlace, as_json: Json = False) -> None:
    """Show the partitions of a store: sequences, tokens, bytes, damaged files, and the time of the last use.

    A partition has the log-probs of one model, computed in one way (engine, data type, device). Its name begins with the
    digest of the model. Only the footers of the files are read.
    """
    from dpo_ray.reference.store import care

    from . import store_view

    root = _store_root(place)
    partitions = care.stats(root)
    if as_json:
        typer.echo(json.dumps([vars(partition) for partition in partitions]))
    else:
        store_view.print_stats(root, partitions, console())


@store.command("verify")
def store_verify(place: StorePlace, as_json: Json = False) -> None:
    """Read a store completely and list all faults: damaged files, values that are not log-probs, contradictory values.

    Exits with code 4 if there is a fault. `dpo-ray store gc` removes damaged files. The next run then computes the missing
    log-probs again.
    """
    from dpo_ray.errors import ArtifactError
    from dpo_ray.reference.store import care

    from . import store_view

    root = _store_root(place)
    faults = list(care.verify(root))
    if as_json:
        typer.echo(json.dumps([vars(fault) for fault in faults]))
    elif faults:
        store_view.print_faults(root, faults, console())
    if faults:
        fix = "`dpo-ray store gc` removes what is damaged; the next run then computes the missing log-probs again"
        what = f"the reference store has {len(faults):,} {'fault' if len(faults) == 1 else 'faults'}"
        raise ArtifactError(what, where=root.uri, fix=fix)
    if not as_json:
        typer.echo(f"{root.uri}: no faults found")


@store.command("gc")
def store_gc(
    place: StorePlace,
    unused_days: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Also delete all partitions that no run has used for N days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; only show what would be done.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also clean up partitions that were used in the last hour.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Clean up a store: delete damaged and leftover files, merge small segments and, if asked, delete unused partitions.

    Partitions that were used in the last hour are left alone, because a run may still be writing to them. Intact
    log-probs are deleted only if their whole partition is unused. A run that needs deleted log-probs computes them
    again.
    """
    from dpo_ray.reference.store.gc import clear

    from . import store_view

    done = clear(_store_root(place), unused_days=unused_days, force=force, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps([vars(cleared) for cleared in done]))
    elif done:
        store_view.print_cleared(done, dry_run, console())
    else:
        typer.echo("nothing to clear")


def _store_root(place: str) -> Storage:
    """Return the directory of a store. `place` is the store's address, or a recipe that uses the store.

    The store of a recipe may be empty or missing.

    Raises:
        ConfigError: there is no store at the address.
    """
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
