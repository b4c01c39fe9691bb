"""The commands that run a recipe on Kubernetes: render, validate, apply, watch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dpo_ray.errors import ConfigError

if TYPE_CHECKING:
    from dpo_ray.config.recipe import Recipe

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
Context = Annotated[
    str | None, typer.Option(metavar="NAME", help="A context of the kubeconfig. Default: its current context.")
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
) -> None:
    """Render a recipe's manifests, check them, and apply them to a cluster."""
    from dpo_ray.deploy.kubernetes import client
    from dpo_ray.deploy.kubernetes.render import stamped

    loaded = _loaded(recipe, overrides)
    manifests = stamped(_rendered(loaded, kind))
    cluster = client.connect(context)
    for line in client.apply(cluster, manifests, replace=replace):
        typer.echo(line)
    if wait and kind == "RayJob":
        _follow(cluster, loaded)


@kubernetes.command()
def watch(recipe: RecipeFile, overrides: Overrides = None, context: Context = None) -> None:
    """Follow a recipe's RayJob until it has finished, and exit with its exit code."""
    from dpo_ray.deploy.kubernetes import client

    _follow(client.connect(context), _loaded(recipe, overrides))


def _follow(cluster: Any, recipe: Recipe) -> None:
    from dpo_ray.deploy.kubernetes import client
    from dpo_ray.deploy.kubernetes.render import run_name

    state = None
    for state in client.watch(cluster, recipe.cluster.kubernetes.namespace, run_name(recipe)):
        typer.echo(str(state))
    raise typer.Exit(state.exit_code if state is not None else client.FAILED_CODE)


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
        return [f"a manifest must be a mapping, this is a {type(manifest).__name__}"]
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
