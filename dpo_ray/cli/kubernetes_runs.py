"""The commands for runs that are on Kubernetes: list, stop, delete, logs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dpo_ray.errors import ConfigError
from dpo_ray.observe.text import duration, harmless

from .options import Json, console

if TYPE_CHECKING:
    from dpo_ray.deploy.kubernetes.client import Cluster
    from dpo_ray.deploy.kubernetes.files_pod import Place

Context = Annotated[
    str | None, typer.Option(metavar="NAME", help="A context of the kubeconfig. Default: its current context.")
]
Namespace = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The namespace. Default: that of the recipe, or of the kubeconfig's context."),
]
Target = Annotated[
    str, typer.Argument(metavar="NAME", help="The name of the RayJob, as `list` shows it, or its recipe, a YAML file.")
]


def list_runs(namespace: Namespace = None, context: Context = None, as_json: Json = False) -> None:
    """List the runs of a namespace, the newest first: state, attempt, since when, and why each one waits."""
    from dpo_ray.deploy.kubernetes.client import default_namespace
    from dpo_ray.deploy.kubernetes.runs import every

    place = namespace or default_namespace(context)
    runs = every(cluster_of(context), place)
    if as_json:
        typer.echo(json.dumps([run._asdict() for run in runs]))
        return
    if not runs:
        typer.echo(f"the namespace {place} has no runs")
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

    where, run = _named(name, namespace, context)
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

    where, run = _named(name, namespace, context)
    cluster = cluster_of(context)
    place = place_of(cluster, name, namespace, context) if results else None
    if place is not None and not yes:
        typer.confirm(f"delete {place.directory} on the volume at {place.mount}?", abort=True)
    for line in runs.delete(cluster, where, run):
        typer.echo(line)
    if place is not None:
        from dpo_ray.deploy.kubernetes.stored_files import delete_directory

        with opened_files_pod(cluster, place) as pod:
            delete_directory(cluster, place, pod)
        kept = f"{place.recipe['output']}/artifacts"
        typer.echo(f"{place.directory}: deleted; other runs share {kept}, which stays")


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

    where, run = _named(name, namespace, context)
    cluster = cluster_of(context)
    if attempt is None and file is None:
        if follow:
            _follow(cluster, where, run)
        lines = live_log(cluster, where, run)
        if lines is not None:
            typer.echo("\n".join(lines))
            return
    _print_stored(cluster, place_of(cluster, name, namespace, context), attempt, file)


def _print_stored(cluster: Cluster, place: Place, attempt: int | None, file: str | None) -> None:
    from dpo_ray.deploy.kubernetes import stored_files

    with opened_files_pod(cluster, place) as pod:
        found = stored_files.logs(cluster, place, pod)
        number = stored_files.chosen(found, attempt)
        others = [each for each in found[number] if each != stored_files.DRIVER_LOG]
        typer.echo(
            f"attempt {number} of {', '.join(map(str, found))}; other files of it: {', '.join(others)}", err=True
        )
        path = f"{place.directory}/logs/attempt-{number}/{file or stored_files.DRIVER_LOG}"
        rest = b""
        for piece in stored_files.content(cluster, place, pod, path):
            whole, _, rest = (rest + piece).rpartition(b"\n")
            for line in whole.decode(errors="replace").split("\n") if whole else ():
                typer.echo(harmless(line))
        if rest:
            typer.echo(harmless(rest.decode(errors="replace")))


def _follow(cluster: Cluster, namespace: str, name: str) -> None:
    from dpo_ray.deploy.kubernetes.watch import watch

    try:
        state = watch(cluster, namespace, name, say, typer.echo, from_start=True)
    except KeyboardInterrupt:
        typer.echo(
            f"\nthe run goes on without this command; to look again: dpo-ray kubernetes logs {name} -f", err=True
        )
        raise typer.Exit(130) from None
    raise typer.Exit(state.exit_code)


@contextmanager
def opened_files_pod(cluster: Cluster, place: Place) -> Iterator[str]:
    """Start a pod that mounts the volume of a run, and delete it at the end of the `with` block; yield its name."""
    from dpo_ray.deploy.kubernetes.files_pod import files_pod

    typer.echo(f"{place.name}: starting a small pod that mounts the volume", err=True)
    with files_pod(cluster, place, say) as pod:
        yield pod


def cluster_of(context: str | None) -> Cluster:
    """Return a connection to a cluster, which reports outages on standard error."""
    from dpo_ray.deploy.kubernetes.client import Cluster

    return Cluster(context, say=say)


def _named(target: str, namespace: str | None, context: str | None) -> tuple[str, str]:
    """Return the namespace and the name of a run, given by its name or by its recipe."""
    from dpo_ray.deploy.kubernetes.client import default_namespace
    from dpo_ray.deploy.kubernetes.render import run_name

    if not _is_file(target):
        return namespace or default_namespace(context), target
    recipe = _loaded(target)
    return namespace or recipe.cluster.kubernetes.namespace, run_name(recipe)


def place_of(cluster: Cluster, target: str, namespace: str | None, context: str | None) -> Place:
    """Return where a run keeps its files, given by its name or by its recipe."""
    from dpo_ray.deploy.kubernetes.files_pod import place_of_recipe, place_of_run

    where, name = _named(target, namespace, context)
    if _is_file(target):
        return place_of_recipe(_loaded(target))._replace(namespace=where)
    return place_of_run(cluster, where, name)


def _is_file(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _loaded(target: str) -> Any:
    from dpo_ray.config.load import load_recipe

    if not Path(target).is_file():
        raise ConfigError(
            "there is no such recipe", where=target, fix="use the name of a run or the path of its recipe"
        )
    return load_recipe(Path(target), [])


def say(text: str) -> None:
    """Print what happens, with the time, to standard error: standard output has the log alone."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)
