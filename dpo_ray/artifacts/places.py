"""The locations of a recipe's files: the directory of its run, its artifacts and its reference store."""

from __future__ import annotations

from dpo_ray.config.recipe import Recipe

from .storage import Storage
from .store import ArtifactStore


def run_storage(recipe: Recipe) -> Storage:
    """Return the directory of the recipe's run: OUTPUT/NAME."""
    return Storage(recipe.output).child(recipe.name)


def artifact_store(recipe: Recipe) -> ArtifactStore:
    """Return the artifact store, which all runs with the same output share: OUTPUT/artifacts."""
    return ArtifactStore(Storage(recipe.output).child("artifacts"))


def reference_root(recipe: Recipe) -> Storage:
    """Return the directory of the stored reference log-probs: reference.store of the recipe, or OUTPUT/reference-store."""
    return (
        Storage(recipe.reference.store) if recipe.reference.store else Storage(recipe.output).child("reference-store")
    )
