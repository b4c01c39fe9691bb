"""Where training is placed: which GPUs it has, and how many copies of the weights."""

from __future__ import annotations

import pytest

from dpo_ray.capacity.fit import gpus_beside
from dpo_ray.config.load import load_recipe
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("recipe", "overrides", "gpus"),
    [
        (
            "zephyr_7b_dpo",
            ("reference.replicas=3", "reference.tensor_parallel=2", "cluster.roles.reference.gpus=2"),
            0,
        ),  # the engines are gone by then
        (
            "zephyr_7b_dpo",
            (
                "reference.mode=streaming",
                "reference.replicas=3",
                "reference.tensor_parallel=2",
                "cluster.roles.reference.gpus=2",
            ),
            6,
        ),
        ("quickstart_online", ("reference.replicas=2", "reference.tensor_parallel=4"), 8),
    ],
)
def test_an_engine_keeps_all_gpus_of_its_tensor_parallelism(recipe: str, overrides: tuple[str, ...], gpus: int) -> None:
    assert gpus_beside(load_recipe(REPOSITORY / f"pipelines/{recipe}.yaml", list(overrides))) == gpus
