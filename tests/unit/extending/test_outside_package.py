"""Another package adds an objective, a format, a judge and a tracker without a change to dpo_ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.outside_package import ENTRY_POINTS, FILES, write_outside_package

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
    return with_package(tmp_path_factory.mktemp("site"))


def with_package(site: Path, **how: str) -> dict[str, str]:
    """Return an environment in which a variant of the other package is installed."""
    write_outside_package(site, **how)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)])}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
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


# What a package may do wrongly: its entry points with `before` replaced by `after`, and what the error says.
WRONG = {
    "a name that dpo_ray has": (
        "objective_configs]\n",
        "objective_configs]\nsigmoid = outside.objective_config:SquaredHinge\n",
        "the name `sigmoid` is already taken",
    ),
    "no implementation": (
        "squared_hinge = outside.objective:squared_hinge\n",
        "",
        "`squared_hinge` has a configuration, but no implementation",
    ),
    "no such module": (
        "votes = outside.format:VOTES",
        "votes = outside.forma:VOTES",
        "outside.forma:VOTES cannot be imported",
    ),
    "a format that dpo_ray has": (
        "votes = outside.format:VOTES",
        "scored = outside.format:VOTES",
        "the name `scored` is already taken",
    ),
    "no such class": (
        "exclaiming = outside.judge:Exclaiming",
        "exclaiming = outside.judge:Shouting",
        "outside.judge:Shouting cannot be imported",
    ),
    "two names": (
        "exclaiming = outside.judge_config:",
        "shouting = outside.judge_config:",
        "`shouting` has a configuration",
    ),
}

# Forks `dpo-ray validate` for each package, after the import of what all of them need, which takes longer than the rest.
VALIDATE_ALL = """
import os, runpy, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
recipe, *sites = sys.argv[1:]
for site in sites:
    if os.fork() == 0:
        sys.stderr = open(os.path.join(site, "errors"), "w")
        sys.path.insert(0, site)
        sys.argv = ["dpo-ray", "validate", recipe]
        try:
            runpy.run_module("dpo_ray", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        print(code, file=sys.stderr, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what `validate` writes to standard error, and its exit code after it, for each wrong package."""
    directory = tmp_path_factory.mktemp("wrong")
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        "name: x\nmodel: {path: builtin:sentiment_llama}\nevaluate: {sample_prompts: 0}\n"
        "data: {max_length_tokens: 128, train: {type: synthetic, pairs: 4}}\n"
    )
    sites = {name: directory / f"site-{number}" for number, name in enumerate(WRONG)}
    for name, (before, after, _) in WRONG.items():
        assert before in ENTRY_POINTS
        write_outside_package(sites[name], entry_points=ENTRY_POINTS.replace(before, after))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run(environment, "-c", VALIDATE_ALL, str(recipe), *map(str, sites.values()))
    return {name: (site / "errors").read_text() for name, site in sites.items()}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_package_adds_wrongly_is_one_clear_error(wrong: str, refusals: dict[str, str]) -> None:
    """A name of dpo_ray's own is never replaced, and a missing part is found before a run begins."""
    said = refusals[wrong]
    assert said.splitlines()[-1] == "2"
    assert WRONG[wrong][2] in said
    assert "outside 1.0" in said or "dpo_ray." in said
    assert "Traceback" not in said


def test_another_version_of_the_package_makes_stale_what_its_code_made(tmp_path: Path) -> None:
    """Results of its loss, format and judge get other keys; those of a recipe that uses none of them do not."""
    code = """
import json
from dpo_ray.config.extension import FORMATS, OBJECTIVES, packages_of
from dpo_ray.config.judge import VerifierJudge
from dpo_ray.online.judges.make import judge_digest
from outside.judge_config import ExclaimingConfig
print(json.dumps([judge_digest(ExclaimingConfig()), packages_of(OBJECTIVES, {"squared_hinge"}), packages_of(FORMATS, {"votes"}),
                  judge_digest(VerifierJudge(check="exact")), packages_of(OBJECTIVES, {"sigmoid"})]))
"""
    one, two = (
        json.loads(run(with_package(tmp_path / version, version=version), "-c", code)) for version in ("1.0", "1.1")
    )
    assert one[0] != two[0]
    assert (one[1], two[1]) == (["outside 1.0"], ["outside 1.1"])
    assert (one[2], two[2]) == (["outside 1.0"], ["outside 1.1"])
    assert one[3:] == two[3:]
    assert one[4] == []


def test_it_takes_as_many_files_as_the_page_says() -> None:
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    files = {"an objective": "objective", "a format": "format", "a judge": "judge", "a tracker": "tracker"}
    for thing, name in files.items():
        own = [file for file in FILES if file in (name, f"{name}_config")]
        assert f"| {thing} | {len(own)} |" in page
