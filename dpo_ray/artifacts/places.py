"""The locations of a recipe's run, artifacts and reference store."""

from __future__ import annotations

from dpo_ray.config.recipe import Recipe

from .storage import Storage
from .store import ArtifactStore


def run_storage(recipe: Recipe) -> Storage:
    """Return the run's own directory: OUTPUT/NAME."""
    return Storage(recipe.output).child(recipe.name)


def artifact_store(recipe: Recipe) -> ArtifactStore:
    """Return the artifact store that all runs under one output share: OUTPUT/artifacts."""
    return ArtifactStore(Storage(recipe.output).child("artifacts"))


def reference_root(recipe: Recipe) -> Storage:
    """Return the location of the reference store: reference.store, or OUTPUT/reference-store."""
    return (
        Storage(recipe.reference.store) if recipe.reference.store else Storage(recipe.output).child("reference-store")
    )
