"""The recipe's models: sources in their short forms, unions, agreement between sections, and the JSON Schema."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import pytest

from dpo_ray.config.load import apply_overrides, validate_recipe
from dpo_ray.config.objective import IpoObjective, SigmoidObjective
from dpo_ray.config.online import MixConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.sources import FilesSource, HubSource, SyntheticSource
from dpo_ray.errors import ConfigError

LEAST: dict[str, Any] = {"name": "r", "model": {"path": "m"}, "data": {"train": "synthetic"}}


def recipe(*overrides: str) -> Recipe:
    return validate_recipe(apply_overrides(LEAST, list(overrides)))


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        ("synthetic", (SyntheticSource(),)),
        ("a/*.jsonl", (FilesSource(path="a/*.jsonl"),)),
        ("s3://b/x", (FilesSource(path="s3://b/x"),)),
        ("hub:org/name", (HubSource(path="org/name"),)),
        ("{path: a, format: hh}", (FilesSource(path="a", format="hh"),)),
        ("{path: [a, b]}", (FilesSource(path=("a", "b")),)),
        ("{type: hub, path: org/name, split: test}", (HubSource(path="org/name", split="test"),)),
        ("[a, hub:b, {type: synthetic, pairs: 3}]", (FilesSource(path="a"), HubSource(path="b"), SyntheticSource(pairs=3))),
        ("[]", ()),
    ],
)  # fmt: skip
def test_a_source_may_be_written_short(given: str, sources: tuple[object, ...]) -> None:
    assert recipe(f"data.eval={given}", "evaluate.sample_prompts=0").data.eval == sources


@pytest.mark.parametrize(
    ("given", "sets"),
    [
        ("{path: a}", {"eval": (FilesSource(path="a"),)}),
        ("{type: synthetic, pairs: 3}", {"eval": (SyntheticSource(pairs=3),)}),
        ("{helpful: a, harmless-1: [b, hub:c]}", {
            "eval_helpful": (FilesSource(path="a"),),
            "eval_harmless-1": (FilesSource(path="b"), HubSource(path="c")),
        }),
        ("[]", {}),
    ],
)  # fmt: skip
def test_held_out_data_is_one_set_or_several_by_name(given: str, sets: dict[str, object]) -> None:
    assert recipe(f"data.eval={given}", "evaluate.sample_prompts=0").data.eval_sets == sets


def test_an_objective_is_told_by_its_type_and_is_sigmoid_without_one() -> None:
    assert recipe().train.objective == SigmoidObjective()
    assert recipe("train.objective={beta: 0.3}").train.objective == SigmoidObjective(beta=0.3)
    assert recipe("train.objective={type: ipo, beta: 0.3}").train.objective == IpoObjective(beta=0.3)
    with pytest.raises(ConfigError, match=r"train\.objective\.label_smoothing: unknown key"):
        recipe("train.objective={type: ipo, label_smoothing: 0.1}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("output", "s3://bucket/x"),
        ("seed", 7),
        ("model.path", "builtin:x"),
        ("data.train", (FilesSource(path="x.jsonl"),)),
        ("data.eval", (FilesSource(path="x.jsonl"),)),
        ("reference.engine", "trainer"),
        ("reference.replicas", 3),
        ("train.workers", 3),
        ("train.objective.type", "ipo"),
        ("train.objective.beta", 0.7),
        ("train.steps", 9),
        ("train.epochs", 4),
    ],
)
def test_a_settled_key_can_be_set_on_the_command_line(key: str, value: object) -> None:
    text = "x.jsonl" if isinstance(value, tuple) else str(value)
    assert reduce(getattr, key.split("."), recipe(f"{key}={text}")) == value


def test_a_recipe_survives_being_written_and_read() -> None:
    made = recipe("data.eval=[a, hub:b]", "train.objective.type=ipo", "train.optimizer.learning_rate=5e-7")
    assert validate_recipe(made.model_dump(mode="json")) == made
    assert Recipe.model_validate_json(made.model_dump_json()) == made


def test_sections_agree() -> None:
    with pytest.raises(ConfigError, match=r"train\.eval_every_steps: there is no held-out data"):
        recipe("train.eval_every_steps=5")
    assert recipe("train.eval_every_steps=5", "data.eval=x").train.eval_every_steps == 5


@pytest.mark.parametrize("earlier_rounds", [0.5, 0.75])
def test_a_round_has_room_for_its_new_pairs(earlier_rounds: float) -> None:
    assert MixConfig(offline=0.5, earlier_rounds=0.25).earlier_rounds == 0.25
    with pytest.raises(ValueError, match="no share is left for the new pairs"):
        MixConfig(offline=0.5, earlier_rounds=earlier_rounds)


def test_a_local_ray_has_the_cpus_that_the_recipe_asks_for() -> None:
    assert recipe("train.workers=3", "cluster.roles.train.cpus=1.5").cpus_needed() == 5
    assert recipe("reference.replicas=4").cpus_needed() == 5
    assert recipe("cluster.roles.prepare.cpus=6").cpus_needed() == 1 + 6  # beside an engine
    assert recipe("train.workers=3", "ray.cpus=3").ray.cpus == 3
    assert recipe("train.workers=3", "ray.cpus=1", "ray.address=auto").ray.cpus == 1
    with pytest.raises(ConfigError, match=r"ray\.cpus: 2 CPUs are fewer than .* at least 3"):
        recipe("train.workers=3", "ray.cpus=2")


def test_the_schema_describes_every_field_and_allows_the_short_forms() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    definitions = schema["$defs"]
    assert set(schema["required"]) == {"name", "model", "data"}
    assert schema["additionalProperties"] is False
    assert definitions["SigmoidObjective"]["properties"]["beta"]["description"].startswith("Strength of the pull")
    train = definitions["DataConfig"]["properties"]["train"]
    assert {"type": "string"} in train["anyOf"]
    assert any(form.get("type") == "array" for form in train["anyOf"])
    assert {"SigmoidObjective", "IpoObjective", "FilesSource", "HubSource", "SyntheticSource"} <= set(definitions)
