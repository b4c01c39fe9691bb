"""The commands that copy files to and from the volume of a run, upload and download, and the check of `apply`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_ray.errors import ConfigError, InfrastructureError

from .kubernetes_cluster import Context, Namespace, Target, cluster_of, opened_files_pod, say, volume_of

if TYPE_CHECKING:
    from dpo_ray.config.recipe import Recipe
    from dpo_ray.deploy.kubernetes.client import Cluster


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
    from dpo_ray.deploy.kubernetes.apply import apply_object
    from dpo_ray.deploy.kubernetes.client import CLAIM
    from dpo_ray.deploy.kubernetes.files_pod import volume_of_recipe
    from dpo_ray.deploy.kubernetes.render import render

    loaded = load_recipe(recipe, overrides or [])
    volume = volume_of_recipe(loaded)
    selected = transfer.select_files(loaded, volume.mount)
    for line in selected.left:
        typer.echo(line)
    if not selected.files:
        typer.echo("nothing to copy: the recipe names no files of this machine")
        return
    cluster = cluster_of(context)
    for manifest in render(loaded):
        if manifest["kind"] == CLAIM.kind:
            typer.echo(apply_object(cluster, manifest))
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


def check_named_files(cluster: Cluster, recipe: Recipe) -> None:
    """Check that the claim of a recipe, and the files on its volume that the recipe names, are there before a run starts.

    Where this machine may not start the small pod that looks for the files, say so and check nothing.

    Raises:
        ConfigError: the claim or a file is not there.
    """
    from dpo_ray.deploy.kubernetes import named_files
    from dpo_ray.deploy.kubernetes.client import CLAIM
    from dpo_ray.deploy.kubernetes.files_pod import volume_of_recipe

    profile = recipe.cluster.kubernetes
    if profile.storage is None:
        return
    files = named_files.on_volume(recipe, profile.storage.mount)
    if cluster.get(CLAIM, profile.namespace, profile.storage.claim) is None:
        if profile.storage.create_gib is None:
            fix = "name one that exists, or set cluster.kubernetes.storage.create_gib, with which `apply` makes it"
            what = "there is no such PersistentVolumeClaim"
            raise ConfigError(what, where=f"{profile.namespace}/{profile.storage.claim}", fix=fix)
        named_files.refuse_missing(files)
    if not files:
        return
    volume = volume_of_recipe(recipe)
    try:
        with opened_files_pod(cluster, volume) as pod:
            named_files.check_present(cluster, volume, pod, files)
    except InfrastructureError as error:
        say(f"whether the files that the recipe names are on the volume was not checked: {error.what}")
