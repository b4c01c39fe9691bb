"""Arguments and options that several commands share, the loading of a recipe, and the console."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from dpo_ray.config.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values that override those of the recipe.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Tiny = Annotated[
    bool,
    typer.Option(
        "--tiny",
        help="Use a miniature of the recipe: a tiny random model, synthetic data, 3 steps, on this machine, without a network.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and its workers log.")]


def load(file: Path, overrides: list[str] | None, *, tiny: bool) -> Recipe:
    """Load a recipe with its overrides. With `tiny`, shrink it to a miniature, whose values replace the overrides."""
    from dpo_ray.config.load import load_recipe

    recipe = load_recipe(file, overrides or [])
    if not tiny:
        return recipe
    from dpo_ray.run.tiny import tiny_recipe

    return tiny_recipe(recipe)


def console() -> Console:
    """Open a console on standard output. If the output is not a terminal, the console is so wide that no cell is cut."""
    return Console() if sys.stdout.isatty() else Console(width=200)
