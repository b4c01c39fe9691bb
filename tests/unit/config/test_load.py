"""Reading a recipe: YAML, overrides, and the words of its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dpo_ray.config.load import apply_overrides, load_recipe, read_recipe_values, validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError

PACKAGE = Path(__file__).parents[3]
LEAST = {"name": "r", "model": {"path": "m"}, "data": {"train": "synthetic"}}


def recipe(*overrides: str) -> Recipe:
    return validate_recipe(apply_overrides(LEAST, list(overrides)))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=5e-7", 5e-7),
        ("a.b=1E3", 1000.0),
        ("a.b=.5e1", 5.0),
        ("a.b=3", 3),
        ("a.b=0.1", 0.1),
        ("a.b=true", True),
        ("a.b=null", None),
        ("a.b=", None),
        ("a.b=text", "text"),
        ("a.b='3'", "3"),
        ("a.b=[x, 2]", ["x", 2]),
        ("a.b={c: 1}", {"c": 1}),
        ("a.b=x=y", "x=y"),
        ("a.b=s3://bucket/prefix", "s3://bucket/prefix"),
        ("a.b=data/train-*.jsonl.gz", "data/train-*.jsonl.gz"),
    ],
)
def test_an_override_is_read_as_yaml(override: str, value: object) -> None:
    read = apply_overrides({}, [override])["a"]["b"]
    assert read == value
    assert type(read) is type(value)


def test_overrides_make_sections_fill_empty_ones_and_leave_their_input_alone() -> None:
    values = {"train": {"steps": 3}, "evaluate": None}
    after = apply_overrides(values, ["train.steps=4", "train.optimizer.eps=1", "evaluate.temperature=2", "seed=1"])
    assert after == {
        "train": {"steps": 4, "optimizer": {"eps": 1}},
        "evaluate": {"temperature": 2},
        "seed": 1,
    }
    assert values == {"train": {"steps": 3}, "evaluate": None}


def test_the_last_override_wins() -> None:
    assert recipe("seed=1", "seed=2").seed == 2


def test_yaml_beats_the_default_and_the_command_line_beats_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: r\nmodel: {path: m}\ndata: {train: synthetic}\ntrain: {groups_per_step: 32, workers: 2}\n")
    read = load_recipe(file, ["train.workers=4"]).train
    assert (read.groups_per_step, read.workers, read.tokens_per_micro_batch) == (32, 4, 8192)


@pytest.mark.parametrize("file", sorted([*PACKAGE.glob("pipelines/*.yaml"), PACKAGE / "dpo_ray/config/starter.yaml"]))
def test_every_recipe_of_the_project_is_valid(file: Path) -> None:
    assert load_recipe(file, []).name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+4", 4),
        ("-3.", -3.0),
        (".5", 0.5),
        ("190:20:30", "190:20:30"),  # YAML 1.1 reads it to base 60
        ("1_000", "1_000"),
        ("0b11", "0b11"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = apply_overrides({}, [f"a={text}"])["a"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", ["0x" + "f" * 100_000, "9" * 5_000, "1" * 41])
def test_a_number_of_endless_digits_is_one_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a number of [\d,]+ digits cannot be a value"):
        apply_overrides({}, [f"seed={text}"])


def test_a_number_that_nothing_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps: 1e\+20 is too large"):
        validate_recipe(apply_overrides(LEAST, ["train.steps=100000000000000000000"]))


def test_numbers_of_yaml_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("a: 5e-7\nb: 1e3\nc: 1.5\nd: '5e-7'\ne: 5e\n")
    assert read_recipe_values(file) == {"a": 5e-7, "b": 1000.0, "c": 1.5, "d": "5e-7", "e": "5e"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("modle.path=x", "modle: unknown key; did you mean `model`?"),
        ("train.objective.bta=1", "train.objective.bta: unknown key; did you mean `beta`?"),
        ("data.train={type: synthetic, pair: 1}", "data.train.0.pair: unknown key; did you mean `pairs`?"),
        ("data.train={path: x, columns: {promt: p}}", "data.train.0.columns.promt: unknown key; did you mean `prompt`"),
        ("optimizer.learning_rate=1", "optimizer: unknown key; did you mean `train.optimizer`?"),
        ("train.beta=1", "train.beta: unknown key; did you mean `train.objective.beta`?"),
        ("reference.audit.frobnicate=1", "reference.audit has: groups, max_bias, max_margin_error, max_mean_drift"),
        (
            "train.objective.type=ppo",
            "train.objective.type: 'ppo' is not known; allowed: 'sigmoid', 'sigmoid_norm', 'hinge', 'ipo'",
        ),
        ("data.train={pairs: 3}", "data.train.0.type: is required, but missing"),
        ("data.train=3", "data.train: a list is expected; got 3"),
        ("data.train={path: 3}", "data.train.0.path: text is expected (quote it); got 3\n  ->"),
        ("data.train={path: x, criteria: {truth: -1}}", "data.train.0.criteria.truth: input should be greater than 0"),
        ("data.eval={path: x, formt: hh}", "data.eval.0.formt: unknown key; did you mean `format`?"),
        ("data.eval={mine: {path: x, formt: hh}}", "data.eval.mine.0.formt: unknown key; did you mean `format`?"),
        ("data.eval={mine: [x, {type: kafka}]}", "data.eval.mine.1.type: 'kafka' is not known; allowed: 'files'"),
        ("data.eval={mine: 3}", "data.eval.mine: a list is expected; got 3"),
        ("data.eval={MINE: x}", "data.eval.MINE: string should match pattern"),
        (
            "data.eval={mine: [{path: x, weight: 1}, y]}",
            "data.eval.mine: some sources have a weight and others have none",
        ),
        ("train.optimizer.betas=[0.9, 2]", "train.optimizer.betas.1: input should be less than 1; got 2"),
        ("train.objective.label_smoothing=0.5", "train.objective.label_smoothing: input should be less than 0.5"),
        ("evaluate=", "evaluate: a section (a mapping of keys) is expected; got nothing"),
        ("name=no", "name: false is not allowed here"),
        ("reference.share_prompt=maybe", "reference.share_prompt: true or false is expected; got 'maybe'"),
        ("train.epochs=1.5", "train.epochs: a whole number is expected; got 1.5"),
        ("seed=-1", "seed: input should be greater than or equal to 0; got -1"),
        ("train.keep_checkpoints=1", "train.keep_checkpoints: input should be greater than or equal to 2"),
        ("trackers=[wandb]", "trackers.0: input should be 'tensorboard'"),
        ("name=reference-store", "name: `reference-store` is the name of a directory"),
        ("online.judge={type: function, function: x}", "online.judge.function: string should match pattern"),
        ("train.workers=1000000000", "train.workers: input should be less than or equal to 100000; got 1000000000"),
        (
            "data.train={type: synthetic, pairs: 1000000000000}",
            "data.train.0.pairs: input should be less than or equal",
        ),
        ("train.hang_seconds=1e300", "train.hang_seconds: 1e+300 is outside of 1e-30 to 1e+30"),
        ("train.optimizer.eps=1e-300", "train.optimizer.eps: 1e-300 is outside of 1e-30 to 1e+30"),
        (
            "cluster.roles.train.gpus=1.5",
            "cluster.roles.train.gpus: a whole number of GPUs, or a share of one, is expected",
        ),
        ("ray.address=ray://head:10001", "ray.address: local, auto or HOST:PORT is expected; got 'ray://head:10001'"),
        ('name="a\\0b"', "command line, name, line 1: not valid YAML: the text contains NUL or a lone surrogate"),
        ('output="\\ud800"', "command line, output, line 1: not valid YAML: the text contains NUL or a lone surrogate"),
    ],
)
def test_an_error_names_the_field_its_value_and_what_is_allowed(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(override)
    assert says in str(caught.value)


def test_a_recipe_does_not_change() -> None:
    made = recipe()
    with pytest.raises(ValidationError):
        made.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        made.train.workers = 3  # type: ignore[misc]
