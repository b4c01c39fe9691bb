"""The commands that copy files to and from the volume of a run: upload and download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .kubernetes_cluster import Context, Namespace, Target, cluster_of, opened_files_pod, say, volume_of


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
    from dpo_ray.deploy.kubernetes.files_pod import volume_of_recipe

    loaded = load_recipe(recipe, overrides or [])
    volume = volume_of_recipe(loaded)
    selected = transfer.select_files(loaded, volume.mount)
    for line in selected.left:
        typer.echo(line)
    if not selected.files:
        typer.echo("nothing to copy: the recipe names no files of this machine")
        return
    cluster = cluster_of(context)
    with opened_files_pod(cluster, volume) as pod:
        for file in selected.files:
            done = transfer.upload(cluster, volume, pod, file, say, overwrite=overwrite)
            typer.echo(f"{file.remote}: {done}")


def download(
    name: Target,
    namespace: Namespace = None,
    context: Context = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory for the files. Default: the name of the run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files here that differ.")] = False,
) -> None:
    """Copy the report and the policy of a run that has ended from its volume to this machine.

    A small pod reads them. Files that are here already are compared and left; repeat the command to resume.
    """
    from dpo_ray.deploy.kubernetes import results

    cluster = cluster_of(context)
    volume = volume_of(cluster, name, namespace, context)
    with opened_files_pod(cluster, volume) as pod:
        for file in results.result_files(cluster, volume, pod, to or Path(volume.recipe["name"])):
            done = results.download(cluster, volume, pod, file, say, overwrite=overwrite)
            typer.echo(f"{file.local}: {done}")
