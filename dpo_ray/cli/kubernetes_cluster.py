"""What the commands for runs on Kubernetes share: their options, the connection, the volume of a run, following a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_ray.errors import ConfigError, LostSightError

if TYPE_CHECKING:
    from dpo_ray.deploy.kubernetes.client import Cluster
    from dpo_ray.deploy.kubernetes.files_pod import RunVolume

HEAD_LOST_SECONDS = 600.0
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


def follow_run(
    cluster: Cluster,
    namespace: str,
    name: str,
    again: str,
    say: Callable[[str], None],
    *,
    from_start: bool,
    head_lost_seconds: float = HEAD_LOST_SECONDS,
) -> None:
    """Follow a run until it has ended, and exit with its exit code. Neither Ctrl-C nor a lost API server stops the run.

    Args:
        again: the command with which a person looks at the run again.
    """
    from dpo_ray.deploy.kubernetes.state import failure_of
    from dpo_ray.deploy.kubernetes.watch import watch

    try:
        state = watch(
            cluster, namespace, name, say, typer.echo, from_start=from_start, head_lost_seconds=head_lost_seconds
        )
    except KeyboardInterrupt:
        typer.echo(f"\nthe run goes on without this command; to look again: {again}", err=True)
        raise typer.Exit(130) from None
    except LostSightError as error:
        fix = f"the run goes on, and how it ends is not known; to look again: {again}"
        raise LostSightError(error.what, where=error.where, fix=fix) from error
    if state.exit_code != 0:
        typer.echo("\n".join(failure_of(state)), err=True)
    raise typer.Exit(state.exit_code)


@contextmanager
def opened_files_pod(cluster: Cluster, volume: RunVolume) -> Iterator[str]:
    """Start a pod that mounts the volume of a run, and delete it at the end of the `with` block; yield its name."""
    from dpo_ray.deploy.kubernetes.files_pod import files_pod

    typer.echo(f"{volume.name}: starting a small pod that mounts the volume", err=True)
    with files_pod(cluster, volume, say) as pod:
        yield pod


def cluster_of(context: str | None) -> Cluster:
    """Return a connection to a cluster, which reports outages on standard error."""
    from dpo_ray.deploy.kubernetes.client import Cluster

    return Cluster(context, say=say)


def named_run(target: str, namespace: str | None, context: str | None) -> tuple[str, str]:
    """Return the namespace and the name of a run, given by its name or by its recipe."""
    from dpo_ray.deploy.kubernetes.client import default_namespace
    from dpo_ray.deploy.kubernetes.render import run_name

    if not _is_file(target):
        return namespace or default_namespace(context), target
    recipe = _loaded(target)
    return namespace or recipe.cluster.kubernetes.namespace, run_name(recipe)


def volume_of(cluster: Cluster, target: str, namespace: str | None, context: str | None) -> RunVolume:
    """Return where a run keeps its files, given by its name or by its recipe."""
    from dpo_ray.deploy.kubernetes.files_pod import volume_of_recipe, volume_of_run

    where, name = named_run(target, namespace, context)
    if _is_file(target):
        return volume_of_recipe(_loaded(target))._replace(namespace=where)
    return volume_of_run(cluster, where, name)


def _is_file(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _loaded(target: str) -> Any:
    from dpo_ray.config.load import load_recipe

    if not Path(target).is_file():
        raise ConfigError(
            "there is no such recipe", where=target, fix="use the name of a run or the path of its recipe"
        )
    return load_recipe(Path(target), [])


def say(text: str, *, err: bool = True) -> None:
    """Print what happens, with the time; by default to standard error, so that standard output has the log alone."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}", err=err)
