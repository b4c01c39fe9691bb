"""Roles of the cluster section: what each worker requests is set in one place, and wrong values are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config.load import apply_overrides, load_recipe, validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.roles import MOVED_KEYS
from dpo_ray.errors import ConfigError

VALUES: dict[str, Any] = {
    "name": "roles",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {"train": {"type": "synthetic", "pairs": 8}, "eval": {"type": "synthetic", "pairs": 8}},
}


def recipe(*overrides: str) -> Recipe:
    return validate_recipe(apply_overrides(VALUES, list(overrides)))


def test_roles_count_for_the_cpus_that_a_run_needs() -> None:
    sized = recipe("train.workers=8", "cluster.roles={train: {cpus: 3}, reference: {cpus: 5}}")
    assert sized.cpus_needed() == 24
    assert recipe("reference.replicas=4", "cluster.roles.reference.cpus=5").cpus_needed() == 4 * 5 + 1


def test_the_command_line_goes_before_a_role_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES | {"cluster": {"roles": {"train": {"cpus": 3, "memory_gib": 4}}}}))
    train = load_recipe(path, ["cluster.roles.train.cpus=2"]).cluster.roles.train
    assert (train.cpus, train.memory_gib) == (2, 4)


@pytest.mark.parametrize(("old", "new"), sorted(MOVED_KEYS.items()))
def test_a_key_that_is_set_elsewhere_is_one_error_with_its_place(old: str, new: str) -> None:
    values = "{dpo/role: train}" if old.endswith("node_labels") else "2"
    with pytest.raises(ConfigError) as raised:
        recipe(f"{old}={values}")
    assert f"{old}: unknown key; set `{new}` instead" in str(raised.value)
    assert "\n    " not in str(raised.value)
    recipe(f"{new}={values}")  # there it is accepted


def test_as_few_cpus_will_do_as_training_may_go_on_with() -> None:
    placed = recipe("train={workers: 8, min_workers: 3}")
    assert (placed.cpus_needed(), placed.least_cpus()) == (8, 3)


def test_roles_survive_being_written_and_read() -> None:
    placed = recipe("train.workers=2", "cluster.roles={train: {cpus: 8}, prepare: {count: 3, node_labels: {a: b}}}")
    assert Recipe.model_validate(placed.model_dump(mode="json")) == placed
    assert Recipe.model_validate(placed.model_dump(mode="json", exclude_unset=True)) == placed


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.roles.train.cpus=0", "cluster.roles.train.cpus"),
        ("cluster.roles.train={cpu: 2}", "cluster.roles.train.cpu: unknown key"),
        ("cluster.roles.trainer={cpus: 2}", "train"),
        ("cluster.roles.sample.count=2", "cluster.roles.sample.count"),
        ("cluster.roles.prepare.gpus=1", "cluster.roles.prepare.gpus"),
        ("cluster.roles.judge.memory_gib=-1", "cluster.roles.judge.memory_gib"),
        ("cluster.roles.train.node_labels=[train]", "cluster.roles.train.node_labels"),
        ("train.min_workers=2", "train.min_workers"),
        ("train={workers: 4, min_workers: 0}", "train.min_workers"),
        ("train={workers: 8, min_workers: 2, sharding: {mode: hybrid, shard_workers: 4}}", "train.min_workers"),
        ("reference.tensor_parallel=2 cluster.roles.reference.gpus=1", "cluster.roles.reference.gpus"),
        ("cluster.roles.sample.gpus=0", "cluster.roles.sample.gpus"),
        ("cluster.roles.train.node_labels={dpo role: train}", "cluster.roles.train.node_labels"),
        ("cluster.roles.train.node_labels={dpo/role: 'a b'}", "cluster.roles.train.node_labels"),
    ],
)
def test_wrong_roles_are_refused_with_their_field(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe(*re.split(r" (?=\S+=)", override))
    assert said in str(raised.value)
    assert "\n    " not in str(raised.value)  # one error, not one for each place that it came to


def test_a_judge_has_the_processes_that_its_role_says() -> None:
    judged = "online={judge: {type: function, function: 'dpo_ray.data.synthetic.true_reward', cpus_per_replica: 2}, prompts_per_round: 4}"
    before, after = recipe(judged), recipe(judged, "cluster.roles.judge={count: 3, cpus: 1}")
    assert after.cpus_needed() - before.cpus_needed() == 3 - 2
