"""What a rank receives in a step, and over which wires, worked out by hand."""

from __future__ import annotations

import pytest

from dpo_ray.capacity.hardware import Cluster, Gpu
from dpo_ray.capacity.memory import Weights
from dpo_ray.capacity.model_sizes import ModelSizes
from dpo_ray.capacity.time import BANDWIDTH_EFFICIENCY, Traffic, traffic
from dpo_ray.config.recipe import Recipe
from tests.helpers.good_recipe import GOOD

LINK, NETWORK = 400e9, 50e9
CLUSTER = Cluster(nodes=4, gpus_per_node=4, gpu=Gpu("made-up", 1, 1.0, 1.0, LINK, NETWORK))
SIZES = ModelSizes("small", 8, 3, 2, 2, 4, 16, 100)
RECIPE = Recipe.model_validate({"name": "sent", "output": "unused", **GOOD})


def sent(workers: int, shard_ranks: int, micro_batches: int = 1) -> Traffic:
    return traffic(SIZES, RECIPE, CLUSTER, workers, shard_ranks, micro_batches, value_bytes=2)


def test_bytes_are_those_of_ring_collectives() -> None:
    weights = Weights.of(SIZES, RECIPE.train)
    blocks, all_of_them = 3 * weights.block, 3 * weights.block + weights.root
    whole, hybrid = sent(8, 8, micro_batches=3), sent(8, 2, micro_batches=3)
    assert whole.gathered == pytest.approx(7 / 8 * 3 * 2 * (2 * blocks + weights.root))  # bfloat16, the root once
    assert whole.reduced == pytest.approx(7 / 8 * 4 * all_of_them)
    assert whole.replicated == 0
    assert hybrid.gathered == pytest.approx(1 / 2 * 3 * 2 * (2 * blocks + weights.root))
    assert hybrid.replicated == pytest.approx(3 / 4 * 2 * 4 * all_of_them / 2)


@pytest.mark.parametrize(
    ("workers", "shard_ranks", "sharing", "between"),
    [
        (4, 4, LINK, LINK),
        (4, 2, LINK, LINK),
        (16, 4, LINK, NETWORK),  # each node has a copy: weights stay within it, and gradients cross the network
        (16, 16, 4 * NETWORK, NETWORK),  # the whole network of a node
        (16, 8, 4 * NETWORK, NETWORK),
    ],
)
def test_traffic_within_a_node_goes_over_its_links(
    workers: int, shard_ranks: int, sharing: float, between: float
) -> None:
    it = sent(workers, shard_ranks)
    seconds = (it.gathered + it.reduced) / sharing + it.replicated / between
    assert it.seconds == pytest.approx(seconds / BANDWIDTH_EFFICIENCY)
