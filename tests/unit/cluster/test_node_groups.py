"""What a cluster's groups can hold, and the labels that workers get from them."""

from __future__ import annotations

import pytest

from dpo_ray.cluster.node_groups import (
    VARIABLE,
    NodeGroup,
    as_text,
    capacity_of,
    node_groups,
    totals_of,
    with_labels,
)
from dpo_ray.cluster.resources import Resources
from dpo_ray.config.roles import RolesConfig

CPU = NodeGroup("cpu", 4, 0, 16, {"dpo/role": "cpu"}, 3)
ENGINES = NodeGroup("engines", 8, 4, 64, {"dpo/role": "reference", "card": "l40s"}, 2)
TRAINING = NodeGroup("training", 32, 8, 512, {"dpo/role": "training"}, 8)


def test_groups_pass_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert node_groups() == []
    monkeypatch.setenv(VARIABLE, as_text([CPU, ENGINES, TRAINING]))
    assert node_groups() == [CPU, ENGINES, TRAINING]


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        (Resources("workers", 1), 3 * 4 + 2 * 8 + 8 * 32),
        (Resources("workers", 4, gpus=1), 2 * 2 + 8 * 8),
        (Resources("workers", 5), 0 + 2 * 1 + 8 * 6),
        (Resources("workers", 1, memory_gib=65), 8 * 7),
        (Resources("workers", 33), 0),
        (Resources("workers", 1, labels={"dpo/role": "cpu"}), 3 * 4),
        (Resources("workers", 1, labels={"dpo/role": "cpu", "card": "l40s"}), 0),
        (Resources("workers", 1, labels={"dpo/role": "cpu", "ray.io/market-type": "spot"}), 3 * 4),
        (Resources("workers", 8, labels={"card": "in(l40s, h100)"}), 0 + 2 * 1 + 8 * 4),
    ],
)
def test_capacity_counts_nodes_that_may_come(request_: Resources, count: int) -> None:
    assert capacity_of([CPU, ENGINES, TRAINING], request_) == count


def test_totals_are_those_of_all_nodes() -> None:
    assert totals_of([CPU, ENGINES]) == {"CPU": 28, "GPU": 8, "memory": (3 * 16 + 2 * 64) * 2**30}
    assert totals_of([]) == {"CPU": 0, "GPU": 0, "memory": 0}


def test_workers_get_the_labels_of_the_group_that_is_meant_for_them() -> None:
    filled = with_labels(RolesConfig(), [CPU, ENGINES, TRAINING])
    assert filled.train.node_labels == {"dpo/role": "training"}
    assert filled.reference.node_labels == {"dpo/role": "reference"}
    assert filled.prepare.node_labels == filled.judge.node_labels == {}
    assert with_labels(RolesConfig(), [CPU, TRAINING]).reference.node_labels == {}
    assert with_labels(RolesConfig(), []) == RolesConfig()


def test_labels_of_the_recipe_stay() -> None:
    own = {"train": {"node_labels": {"dpo/role": "!cpu"}}, "reference": {"node_labels": {"card": "l40s"}}}
    roles = RolesConfig.model_validate(own)
    assert with_labels(roles, [CPU, ENGINES, TRAINING]) == roles
