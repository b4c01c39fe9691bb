"""The commands that run a recipe on Kubernetes: render, validate, apply, watch; those for its runs are registered here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dpo_ray.errors import ConfigError

from .kubernetes_cluster import HEAD_LOST_SECONDS, Context, follow_run, say
from .kubernetes_files import check_named_files, download, upload
from .kubernetes_runs import delete, list_runs, logs, stop

if TYPE_CHECKING:
    from dpo_ray.config.recipe import Recipe
    from dpo_ray.deploy.kubernetes.client import Cluster

kubernetes = typer.Typer(help="Run recipes on Kubernetes with the KubeRay operator.", no_args_is_help=True)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE", help="Values that override those of the recipe: cluster.kubernetes.image=..."
    ),
]
Kind = Annotated[
    Literal["RayJob", "RayCluster"],
    typer.Option(
        help="RayJob: a cluster that runs the recipe and is then deleted. RayCluster: one that stays, for `dpo-ray submit`."
    ),
]
OUTAGE_SECONDS = 600.0
Outage = Annotated[
    float,
    typer.Option(min=0, help="How long to wait for an API server that no longer answers. The run does not need it."),
]
HeadLost = Annotated[
    float,
    typer.Option(min=0, help="How long a head that was lost may be away before the command ends with exit code 9."),
]


@kubernetes.command()
def render(recipe: RecipeFile, overrides: Overrides = None, kind: Kind = "RayJob") -> None:
    """Print the manifests that run a recipe, for `kubectl apply -f -` or for a repository. This needs no cluster."""
    from dpo_ray.deploy.kubernetes.render import text

    typer.echo(text(_rendered(_loaded(recipe, overrides), kind)), nl=False)


@kubernetes.command()
def validate(
    manifests: Annotated[list[str], typer.Argument(metavar="FILE", help="YAML files, or - for standard input.")],
) -> None:
    """Check manifests offline, against KubeRay's schemas (unknown fields are errors) and the operator's rules."""
    wrong, checked = [], 0
    for file in manifests:
        for manifest in _documents(file):
            checked += 1
            wrong += [f"{file}: {line}" for line in _findings(manifest)]
    if wrong:
        raise _refusal(wrong, ", ".join(manifests))
    typer.echo(f"{checked} manifests: valid")


@kubernetes.command()
def apply(
    recipe: RecipeFile,
    overrides: Overrides = None,
    kind: Kind = "RayJob",
    context: Context = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="First delete an existing RayJob or RayCluster of this name; the new one continues its run.",
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the RayJob until it ends, and exit with its exit code.")
    ] = False,
    outage_seconds: Outage = OUTAGE_SECONDS,
    head_lost_seconds: HeadLost = HEAD_LOST_SECONDS,
) -> None:
    """Render a recipe's manifests, check them, and apply them to a cluster."""
    from dpo_ray.deploy.kubernetes.apply import apply as applied
    from dpo_ray.deploy.kubernetes.client import Cluster
    from dpo_ray.deploy.kubernetes.render import stamped

    loaded = _loaded(recipe, overrides)
    manifests = stamped(_rendered(loaded, kind))
    cluster = Cluster(context, patience_seconds=outage_seconds, say=_say)
    check_named_files(cluster, loaded)
    for line in applied(cluster, manifests, replace=replace):
        typer.echo(line)
    if wait and kind == "RayJob":
        _follow(cluster, recipe, loaded, from_start=True, head_lost_seconds=head_lost_seconds)


@kubernetes.command()
def watch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    context: Context = None,
    outage_seconds: Outage = OUTAGE_SECONDS,
    head_lost_seconds: HeadLost = HEAD_LOST_SECONDS,
) -> None:
    """Follow a recipe's RayJob until it has finished, and exit with its exit code.

    It shows why the run waits, what its driver writes, and which pods are lost. Ctrl-C ends only this command, not the run.
    """
    from dpo_ray.deploy.kubernetes.client import Cluster

    cluster = Cluster(context, patience_seconds=outage_seconds, say=_say)
    _follow(cluster, recipe, _loaded(recipe, overrides), from_start=False, head_lost_seconds=head_lost_seconds)


kubernetes.command("list")(list_runs)
for command in (stop, delete, logs, upload, download):
    kubernetes.command()(command)


def _follow(cluster: Cluster, file: Path, recipe: Recipe, *, from_start: bool, head_lost_seconds: float) -> None:
    from dpo_ray.deploy.kubernetes.render import run_name

    namespace, name = recipe.cluster.kubernetes.namespace, run_name(recipe)
    again = (
        f"dpo-ray kubernetes watch {shlex.quote(str(file))}, or dpo-ray kubernetes logs {name} --namespace {namespace}"
    )
    follow_run(cluster, namespace, name, again, _say, from_start=from_start, head_lost_seconds=head_lost_seconds)


def _say(text: str) -> None:
    """Print what happens to a run among the lines of its driver."""
    say(text, err=False)


def _loaded(recipe: Path, overrides: list[str] | None) -> Recipe:
    from dpo_ray.config.load import load_recipe

    return load_recipe(recipe, overrides or [])


def _rendered(recipe: Recipe, kind: Literal["RayJob", "RayCluster"]) -> list[dict[str, Any]]:
    from dpo_ray.deploy.kubernetes.render import render as rendered

    manifests = rendered(recipe, kind)
    wrong = [line for manifest in manifests for line in _findings(manifest)]
    if wrong:
        raise _refusal(wrong, "cluster.kubernetes")
    return manifests


def _findings(manifest: Any) -> list[str]:
    from dpo_ray.deploy.kubernetes.rules import violations

    if not isinstance(manifest, dict):
        return [f"this manifest is not a mapping, but a {type(manifest).__name__}"]
    metadata = manifest.get("metadata")
    name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
    return [f"{manifest.get('kind', '?')}/{name}: {field}: {what}" for field, what in violations(manifest)]


def _documents(file: str) -> list[Any]:
    import yaml

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return [document for document in yaml.safe_load_all(text) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the file cannot be read: {error}", where=file, fix="name a YAML file, or - for standard input"
        ) from None
    except yaml.YAMLError as error:
        what = f"this is not valid YAML: {' '.join(str(error).split())[:200]}"
        raise ConfigError(what, where=file, fix="correct the line that the message names") from None


def _refusal(wrong: list[str], where: str) -> ConfigError:
    many = f"{len(wrong)} fields are wrong:\n    " + "\n    ".join(wrong)
    fix = "the schemas are those of KubeRay 1.7; cluster/kuberay/README.md lists what dpo-ray renders"
    return ConfigError(wrong[0] if len(wrong) == 1 else many, where=where, fix=fix)
