"""The commands about a recipe itself: check a recipe, print the schema of recipes, write a first recipe."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from dpo_ray.errors import ConfigError

from .options import Json, Overrides, RecipeFile, Tiny, load


def validate(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False, as_json: Json = False) -> None:
    """Check a recipe, the files and models in it that this machine can access, the first rows of the data, and whether this
    machine has enough resources. Starts nothing."""
    from dpo_ray.run.preflight import preflight
    from dpo_ray.run.start_checks import check_start

    loaded = load(recipe, overrides, tiny=tiny)
    checked = preflight(loaded)
    check_start(loaded, checked)
    if loaded.online is not None:
        from dpo_ray.online.checks import check_rounds

        check_rounds(loaded, checked)
    if as_json:
        typer.echo(loaded.model_dump_json())
    else:
        typer.echo(f"{recipe}: valid; {len(checked.shards)} data shards")


def schema() -> None:
    """Print the JSON Schema of recipes, by which an editor can check and complete a recipe."""
    from dpo_ray.config.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented starter recipe that can be run without changes."""
    text = resources.files("dpo_ray.config").joinpath("starter.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(
            "a file of this name already exists", where=str(path), fix="choose another file name"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the file cannot be written: {error.strerror}",
            where=str(path),
            fix="choose a file in a directory that you can write to",
        ) from None
    typer.echo(f"wrote {path}; next: dpo-ray run {path}")
