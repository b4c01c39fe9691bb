"""Roles of the cluster section: they are what the sections of the recipe say, and wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config.load import apply_overrides, load_recipe, validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError

VALUES: dict[str, Any] = {
    "name": "roles",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {"train": {"type": "synthetic", "pairs": 8}, "eval": {"type": "synthetic", "pairs": 8}},
}


def recipe(*overrides: str) -> Recipe:
    return validate_recipe(apply_overrides(VALUES, list(overrides)))


def test_a_role_is_what_its_section_says() -> None:
    role = "{count: 4, cpus: 2, gpus: 1, memory_gib: 8, node_labels: {dpo/role: train}}"
    placed = recipe(f"cluster.roles.train={role}", f"cluster.roles.reference={role}")
    t, r = placed.train, placed.reference
    assert (t.workers, t.cpus_per_worker, t.gpus_per_worker, t.memory_gib_per_worker) == (4, 2, 1, 8)
    assert (r.replicas, r.cpus_per_replica, r.gpus_per_replica, r.memory_gib_per_replica) == (4, 2, 1, 8)
    assert t.node_labels == r.node_labels == {"dpo/role": "train"}


def test_a_role_goes_before_its_section_and_leaves_the_rest_of_it() -> None:
    placed = recipe("train={workers: 2, cpus_per_worker: 3}", "cluster.roles.train.count=8")
    assert (placed.train.workers, placed.train.cpus_per_worker) == (8, 3)
    assert placed.cpus_needed() == 24
    assert placed.cluster.roles.train.count is None  # it is said once


def test_the_command_line_goes_before_a_role_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES | {"cluster": {"roles": {"train": {"count": 2, "cpus": 3}}}}))
    assert load_recipe(path, []).train.workers == 2
    over = load_recipe(path, ["train.workers=8"])
    assert (over.train.workers, over.train.cpus_per_worker) == (8, 3)
    assert load_recipe(path, ["train.workers=8", "cluster.roles.train.count=4"]).train.workers == 4


def test_as_few_cpus_will_do_as_training_may_go_on_with() -> None:
    placed = recipe("train={workers: 8, min_workers: 3}")
    assert (placed.cpus_needed(), placed.least_cpus()) == (8, 3)


def test_roles_survive_being_written_and_read() -> None:
    placed = recipe("train.workers=2", "cluster.roles={train: {count: 8}, prepare: {count: 3, node_labels: {a: b}}}")
    assert Recipe.model_validate(placed.model_dump(mode="json")) == placed
    assert Recipe.model_validate(placed.model_dump(mode="json", exclude_unset=True)) == placed


def test_a_recipe_of_objects_is_placed_as_well() -> None:
    first = recipe("train.workers=2")
    values = {name: getattr(first, name) for name in ("name", "model", "data", "train")}
    placed = Recipe(**values, cluster={"roles": {"train": {"count": 5}}})
    assert placed.train.workers == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.roles.train.count=0", "cluster.roles.train.count"),
        ("cluster.roles.train={cpu: 2}", "cluster.roles.train.cpu: unknown key"),
        ("cluster.roles.trainer={count: 2}", "train"),
        ("cluster.roles.sample.count=2", "cluster.roles.sample.count"),
        ("cluster.roles.prepare.gpus=1", "cluster.roles.prepare.gpus"),
        ("cluster.roles.judge.memory_gib=-1", "cluster.roles.judge.memory_gib"),
        ("cluster.roles.train.node_labels=[train]", "cluster.roles.train.node_labels"),
        ("train.min_workers=2", "train.min_workers"),
        ("train={workers: 4, min_workers: 0}", "train.min_workers"),
        ("train={workers: 8, min_workers: 2, sharding: {mode: hybrid, shard_workers: 4}}", "train.min_workers"),
        ("reference={tensor_parallel: 2, gpus_per_replica: 1}", "reference.gpus_per_replica"),
        ("cluster.roles.sample.gpus=0", "cluster.roles.sample.gpus"),
        ("train.node_labels={dpo role: train}", "train.node_labels"),
        ("train.node_labels={dpo/role: 'a b'}", "train.node_labels"),
    ],
)
def test_wrong_roles_are_refused_with_their_field(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe(override)
    assert said in str(raised.value)
    assert "\n    " not in str(raised.value)  # one error, not one for each place that it came to


def test_a_judge_has_the_processes_that_its_role_says() -> None:
    judged = "online={judge: {type: function, function: 'dpo_ray.data.synthetic.true_reward', cpus_per_replica: 2}, prompts_per_round: 4}"
    before, after = recipe(judged), recipe(judged, "cluster.roles.judge={count: 3, cpus: 1}")
    assert after.cpus_needed() - before.cpus_needed() == 3 - 2
