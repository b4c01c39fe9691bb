"""What the stages of a recipe need at least, against nodes that hold a given number of workers."""

from __future__ import annotations

from dpo_ray.cluster.requests import Lack, missing
from dpo_ray.cluster.resources import Resources
from dpo_ray.config.load import apply_overrides, validate_recipe
from dpo_ray.config.recipe import Recipe

VALUES = {
    "name": "requests",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {"train": {"type": "synthetic", "pairs": 8}, "eval": {"type": "synthetic", "pairs": 8}},
}
STAGES = ("prepare", "reference", "schedule", "train", "evaluate")


def recipe(*overrides: str) -> Recipe:
    return validate_recipe(apply_overrides(VALUES, list(overrides)))


def lacks(recipe: Recipe, holds: dict[str, int], gpus: float = 8.0) -> list[Lack]:
    """List what is missing on nodes that hold this number of workers of each kind, where each takes a GPU."""

    def capacity(request: Resources) -> int:
        return holds.get(request.what, 99)

    return missing(recipe, STAGES, 1.0, 1.0, capacity, {"CPU": 99.0, "GPU": gpus})


def test_training_may_begin_with_the_fewest_workers_that_the_recipe_allows() -> None:
    holds = {"training workers": 2}
    (lack,) = lacks(recipe("train.workers=4"), holds)
    assert lack.field == "cluster.roles.train"
    assert lack.what.startswith("4 training workers are needed")
    assert lack.what.endswith("the nodes can hold only 2")
    assert not lacks(recipe("train.workers=4", "train.min_workers=2"), holds)
    (lack,) = lacks(recipe("train.workers=4", "train.min_workers=3"), holds)
    assert lack.what.startswith("3 training workers are needed")


def test_one_engine_is_enough_however_many_are_wished() -> None:
    assert not lacks(recipe("reference.replicas=4"), {"engines": 1})
    (lack,) = lacks(recipe("reference.replicas=4", "evaluate.sample_prompts=0"), {"engines": 0})
    assert lack.field == "cluster.roles.reference"
    assert lack.what.startswith("1 engines are needed")


def test_streaming_needs_gpus_for_scoring_beside_those_of_training() -> None:
    streaming = ("reference.mode=streaming", "train.workers=4")
    (lack,) = lacks(recipe(*streaming), {}, gpus=4.0)
    assert lack == Lack("cluster.roles", "the run needs up to 5 GPUs at the same time, but the cluster has 4")
    assert not lacks(recipe(*streaming, "train.min_workers=3"), {}, gpus=4.0)
    assert not lacks(recipe("train.workers=4"), {}, gpus=4.0)  # first the engine, then the workers
