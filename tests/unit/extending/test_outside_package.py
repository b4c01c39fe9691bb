"""Another package adds an objective, a format, a judge and a tracker without a change to dpo_ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.outside_package import write_outside_package

REPOSITORY = Path(__file__).resolve().parents[3]

USE_ALL = """
import json, sys
from pathlib import Path
from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.resources import judge_resources
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.sources import Columns
from dpo_ray.data.formats.read import text_group
from dpo_ray.observe.sinks import MetricsSinks
from dpo_ray.online.judges.make import judge_digest, make_judge
from dpo_ray.online.judges.memory import NoMemory
from dpo_ray.online.judges.protocol import Question

place = Path(sys.argv[1])
recipe = validate_recipe({
    "name": "outside",
    "output": str(place / "runs"),
    "model": {"path": "builtin:sentiment_llama"},
    "data": {"train": [{"type": "files", "path": str(place / "rows.jsonl"), "format": "votes"}],
             "eval": [{"type": "synthetic", "pairs": 4}]},
    "train": {"objective": {"type": "squared_hinge", "beta": 0.5}, "steps": 1},
    "trackers": ["counting"],
    "online": {"judge": {"type": "exclaiming", "mark": "?"}, "prompts_per_round": 2},
})
row = {"topic": "Hello", "replies": ["no", "yes"], "votes": [1, 3]}
read = [text_group(row, name, Columns(), {}) for name in ("votes", "auto")]
judge, questions = recipe.online.judge, [Question("Hi", ("a?", "b"), None)]
with MetricsSinks(Storage(place), recipe.trackers) as sinks:
    sinks.begin([])
    sinks.write({"step": 1, "loss": 0.5})
print(json.dumps({
    "scores": [group.scores for group in read],
    "verdicts": [verdict.scores for _, verdict in make_judge(judge, NoMemory()).judge(questions)],
    "digests_differ": judge_digest(judge) != judge_digest(judge.model_copy(update={"mark": "!"})),
    "same_digest": judge_digest(judge) == judge_digest(judge.model_copy(update={"replicas": 2})),
    "gpus": judge_resources(judge, recipe.cluster.roles.judge).gpus,
    "environment": sorted(recipe.online.judge_environment()),
    "steps": (place / "steps.txt").read_text(),
    "objective": recipe.train.objective.type,
}))
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which the other package is installed."""
    site = tmp_path_factory.mktemp("site")
    write_outside_package(site)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)])}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_format_judge_and_tracker_work_as_the_built_in_ones(outside: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"topic": "a", "replies": ["b", "c"], "votes": [1, 2]}\n')
    assert json.loads(run(outside, "-c", USE_ALL, str(tmp_path))) == {
        "scores": [[1.0, 3.0], [1.0, 3.0]],
        "verdicts": [[1.0, 0.0]],
        "digests_differ": True,
        "same_digest": True,
        "gpus": 0.25,
        "environment": ["EXCLAIMING_KEY"],
        "steps": "1",
        "objective": "squared_hinge",
    }


def test_the_schema_names_them(outside: dict[str, str]) -> None:
    schema = run(outside, "-m", "dpo_ray", "schema")
    for name in ("squared_hinge", "votes", "exclaiming", "counting"):
        assert f'"{name}"' in schema


def test_a_loss_is_trained_with(outside: dict[str, str]) -> None:
    """max(0, 1 - beta * margin)^2 of margins 0, 1 and 30 with beta 0.1."""
    code = """
import json, torch
from outside.objective_config import SquaredHinge
from dpo_ray.objectives.select import LOSSES, pair_losses
from types import SimpleNamespace
pairs = SimpleNamespace(margin=torch.tensor([0.0, 1.0, 30.0]), preference_probability=torch.ones(3))
print(json.dumps(pair_losses(SquaredHinge(), pairs).tolist()))
"""
    assert json.loads(run(outside, "-c", code)) == pytest.approx([1.0, 0.81, 0.0])


def test_without_the_package_its_names_are_refused() -> None:
    from dpo_ray.config.load import validate_recipe
    from dpo_ray.errors import ConfigError

    with pytest.raises(ConfigError, match="squared_hinge"):
        validate_recipe({"model": {"path": "x"}, "train": {"objective": {"type": "squared_hinge"}}})
