"""The command that copies what a recipe names onto the volume of its pods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .kubernetes_runs import Context, cluster_of, opened_files_pod, say


def upload(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values that override those of the recipe.")
    ] = None,
    context: Context = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files on the volume that differ from those here.")
    ] = False,
) -> None:
    """Copy the local data and the local model that a recipe names to the places on the volume where its pods look.

    A small pod receives them. Files that are there already are compared and left; repeat the command to resume.
    """
    from dpo_ray.config.load import load_recipe
    from dpo_ray.deploy.kubernetes import transfer
    from dpo_ray.deploy.kubernetes.files_pod import place_of_recipe

    loaded = load_recipe(recipe, overrides or [])
    place = place_of_recipe(loaded)
    plan = transfer.plan(loaded, place.mount)
    for line in plan.left:
        typer.echo(line)
    if not plan.files:
        typer.echo("nothing to copy: the recipe names no files of this machine")
        return
    cluster = cluster_of(context)
    with opened_files_pod(cluster, place) as pod:
        for file in plan.files:
            done = transfer.upload(cluster, place, pod, file, say, overwrite=overwrite)
            typer.echo(f"{file.remote}: {done}")
