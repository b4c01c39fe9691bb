"""The commands that check artifacts, the committed results of stages, below a recipe's `output`."""

from __future__ import annotations

import json

import typer

from dpo_ray.observe.text import harmless

from .options import Json, Overrides, RecipeFile, Tiny, load

artifacts = typer.Typer(
    help="Check the artifacts, the committed results of stages, below a recipe's output.", no_args_is_help=True
)


@artifacts.command("verify")
def verify(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False, as_json: Json = False) -> None:
    """Read all artifacts below the recipe's output, and compare every file with the digest that was committed with it.

    Exits with code 4 if an artifact is damaged. A run checks only the files that it reads; this command checks all files.
    """
    from dpo_ray.artifacts.places import artifact_store
    from dpo_ray.errors import ArtifactError

    store = artifact_store(load(recipe, overrides, tiny=tiny))
    found = dict(store.verify())
    damaged = {name: error for name, error in found.items() if error is not None}
    if as_json:
        typer.echo(json.dumps({name: None if error is None else error.what for name, error in found.items()}))
    for name, error in damaged.items() if not as_json else ():
        typer.echo(harmless(f"{name}: {error.what}"))
    if damaged:
        what = f"{len(damaged):,} of {len(found):,} artifacts {'is' if len(damaged) == 1 else 'are'} damaged"
        raise ArtifactError(
            what, where=store.root.uri, fix="delete the directories of these artifacts; the stages then run again"
        )
    if not as_json:
        typer.echo(f"{store.root.uri}: {len(found):,} artifacts, every file is as it was committed")
