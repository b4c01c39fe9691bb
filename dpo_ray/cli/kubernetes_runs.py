"""The commands for runs that are on Kubernetes: list, stop, delete, logs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dpo_ray.errors import ConfigError
from dpo_ray.observe.text import duration, harmless

from .kubernetes_cluster import (
    Context,
    Namespace,
    Target,
    cluster_of,
    follow_run,
    named_run,
    opened_files_pod,
    say,
    volume_of,
)
from .options import Json, console

if TYPE_CHECKING:
    from dpo_ray.deploy.kubernetes.client import Cluster
    from dpo_ray.deploy.kubernetes.files_pod import RunVolume


def list_runs(namespace: Namespace = None, context: Context = None, as_json: Json = False) -> None:
    """List the runs of a namespace, the newest first: state, attempt, since when, and why each one waits."""
    from dpo_ray.deploy.kubernetes.client import default_namespace
    from dpo_ray.deploy.kubernetes.runs import every

    namespace = namespace or default_namespace(context)
    runs = every(cluster_of(context), namespace)
    if as_json:
        typer.echo(json.dumps([run._asdict() for run in runs]))
        return
    if not runs:
        typer.echo(f"the namespace {namespace} has no runs")
        return
    table = Table()
    for column in ("run", "state", "attempt", "since", "waits for"):
        table.add_column(column, no_wrap=column == "run")
    for run in runs:
        since = f"{duration(run.since)} ago" if run.since is not None else ""
        table.add_row(run.name, run.state, str(run.attempt), since, run.waits)
    console().print(table, markup=False)


def stop(
    name: Target,
    namespace: Namespace = None,
    context: Context = None,
    grace_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Time to finish the step and write a checkpoint; 0: stop at once, without a checkpoint."
        ),
    ] = 600,
) -> None:
    """Stop a run after it has written a checkpoint, and free its pods. If the recipe is applied again, it continues.

    The RayJob is deleted. Results, checkpoints and logs stay on the storage.
    """
    from dpo_ray.deploy.kubernetes import runs

    where, run = named_run(name, namespace, context)
    try:
        runs.stop(cluster_of(context), where, run, grace_seconds, say, typer.echo)
    except KeyboardInterrupt:
        again = f"dpo-ray kubernetes stop {run} --namespace {where}"
        typer.echo(f"\n{run}: if its driver was asked to stop, it still does; to wait again: {again}", err=True)
        raise typer.Exit(130) from None


def delete(
    name: Target,
    namespace: Namespace = None,
    context: Context = None,
    results: Annotated[
        bool, typer.Option("--results", help="Also delete the run's directory: report, metrics, checkpoints, logs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before results are deleted.")] = False,
) -> None:
    """Delete a run at once: its RayJob or RayCluster, pods, recipe, service account and network policy.

    The volume's claim stays, and so do the artifacts (such as the policy) and the reference store, which other runs share.
    """
    from dpo_ray.deploy.kubernetes import runs

    where, run = named_run(name, namespace, context)
    cluster = cluster_of(context)
    volume = volume_of(cluster, name, namespace, context) if results else None
    if volume is not None and not yes:
        typer.confirm(f"delete {volume.directory} on the volume at {volume.mount}?", abort=True)
    try:
        for line in runs.delete(cluster, where, run):
            typer.echo(line)
    except ConfigError as error:
        if volume is None:
            raise
        typer.echo(f"{run}: {error.what}; only its directory is deleted")
    if volume is not None:
        from dpo_ray.deploy.kubernetes.stored_files import delete_directory

        with opened_files_pod(cluster, volume) as pod:
            delete_directory(cluster, volume, pod)
        kept = f"{volume.recipe['output']}/artifacts"
        typer.echo(f"{volume.directory}: deleted; other runs share {kept}, which stays")


def logs(
    name: Target,
    namespace: Namespace = None,
    context: Context = None,
    attempt: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Read what this attempt left on the storage, not what runs now."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Another file of the attempt, such as the end of a worker's log."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the run until it ends, and exit with its exit code.")
    ] = False,
) -> None:
    """Print the log of a run's driver: of the driver that runs, or what its last attempt left on the storage."""
    from dpo_ray.deploy.kubernetes.runs import live_log

    where, run = named_run(name, namespace, context)
    cluster = cluster_of(context)
    if attempt is None and file is None:
        if follow:
            follow_run(
                cluster, where, run, f"dpo-ray kubernetes logs {run} -f --namespace {where}", say, from_start=True
            )
        lines = live_log(cluster, where, run)
        if lines is not None:
            typer.echo("\n".join(lines))
            return
    _print_stored(cluster, volume_of(cluster, name, namespace, context), attempt, file)


def _print_stored(cluster: Cluster, volume: RunVolume, attempt: int | None, file: str | None) -> None:
    from dpo_ray.deploy.kubernetes import stored_files

    with opened_files_pod(cluster, volume) as pod:
        found = stored_files.logs(cluster, volume, pod)
        number = stored_files.chosen(found, attempt)
        others = [each for each in found[number] if each != stored_files.DRIVER_LOG]
        typer.echo(
            f"attempt {number} of {', '.join(map(str, found))}; other files of it: {', '.join(others)}", err=True
        )
        path = f"{volume.directory}/logs/attempt-{number}/{file or stored_files.DRIVER_LOG}"
        rest = b""
        for piece in stored_files.content(cluster, volume, pod, path):
            whole, _, rest = (rest + piece).rpartition(b"\n")
            for line in whole.decode(errors="replace").split("\n") if whole else ():
                typer.echo(harmless(line))
        if rest:
            typer.echo(harmless(rest.decode(errors="replace")))
