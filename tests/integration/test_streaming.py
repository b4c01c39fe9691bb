"""Streaming: training on what is scored already ends with the bits of `ahead`, and leaves the same artifacts."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
import ray
from rich.console import Console

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.config.recipe import Recipe
from dpo_ray.observe.progress import Reporter
from dpo_ray.reference.pool import EnginePool
from dpo_ray.run import offline, planning, streaming
from tests.helpers.fakes import held_back
from tests.helpers.fakes.held_back import HoldBack
from tests.integration.conftest import small_recipe

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400), pytest.mark.usefixtures("ray_cluster")]
ray.cloudpickle.register_pickle_by_value(held_back)  # engines' processes do not find the tests' modules

# 96 pairs in 12 steps: a bucket of 4 steps, then the held-out data (evaluation after step 3), then a bucket of 8 steps.
SHAPE = ("train.groups_per_step=8", "train.workers=2")
GRANULE_GROUPS = {"ahead": 1024, "streaming": 8}
FIRST_BUCKET_SEQUENCES = 2 * 4 * 8


def recipe_of(root: Path, mode: str) -> Recipe:
    granule = f"reference.groups_per_granule={GRANULE_GROUPS[mode]}"  # other batches in the engine, and the same bits
    return small_recipe(root, *SHAPE, granule, f"reference.mode={mode}")


def run(recipe: Recipe) -> tuple[offline.Finished, str]:
    """Run a recipe; returns its artifacts and what it said."""
    said = io.StringIO()
    finished, ran = offline.offline(recipe, Reporter(Console(file=said, width=200)))
    assert ran
    return finished, said.getvalue()


@pytest.fixture(scope="module")
def ahead(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> offline.Finished:
    return run(recipe_of(tmp_path_factory.mktemp("ahead"), "ahead"))[0]


def sha256_of(artifact: Artifact) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in artifact.manifest.files}


def metrics(artifact: Artifact) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in artifact.read_bytes("metrics.jsonl").splitlines()]
    timings = ("seconds_per_step", "tokens_per_second", "data_wait_seconds", "memory_gib", "tflops")
    return [{name: value for name, value in row.items() if name not in timings} for row in rows]


def check_same(streamed: offline.Finished, ahead: offline.Finished) -> None:
    """Check that two runs ended with the same bits, in the same artifacts."""
    weights = "policy/model.safetensors"
    assert streamed.train.entry(weights).sha256 == ahead.train.entry(weights).sha256
    assert metrics(streamed.train) == metrics(ahead.train)
    assert [row["step"] for row in metrics(ahead.train)] == list(range(1, 13))
    assert sum("eval_loss" in row for row in metrics(ahead.train)) == 4
    for stage in ("reference", "schedule"):
        one, other = getattr(streamed, stage), getattr(ahead, stage)
        assert one.key == other.key
        assert one.rows == other.rows
        assert sha256_of(one) == sha256_of(other)
        assert one.manifest.figures.keys() == other.manifest.figures.keys()


def test_training_runs_while_the_pool_scores_and_ends_as_ahead_does(
    ahead: offline.Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = HoldBack(tmp_path / "small" / "metrics.jsonl", FIRST_BUCKET_SEQUENCES)
    monkeypatch.setattr(streaming, "EnginePool", partial(EnginePool, start=start))
    streamed, _ = run(recipe_of(tmp_path, "streaming"))
    check_same(streamed, ahead)
    assert streamed.reference.manifest.figures["sequences"] == 240
    made = [getattr(streamed, s).manifest.created_unix_seconds for s in ("reference", "schedule", "train")]
    assert made == sorted(made)
    assert planning.make_plan(recipe_of(tmp_path, "ahead")).done  # either mode finds the other's work


@pytest.mark.long
def test_a_group_that_cannot_be_scored_sends_it_back_to_ahead(
    ahead: offline.Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine that scores beside training gives a group up when training has begun; another scores it afterwards."""
    start = HoldBack(tmp_path / "small" / "metrics.jsonl", FIRST_BUCKET_SEQUENCES, then_gives_up=True)
    monkeypatch.setattr(streaming, "EnginePool", partial(EnginePool, start=start))
    streamed, said = run(recipe_of(tmp_path, "streaming"))
    assert "1 groups cannot be scored" in said
    assert "training starts again" in said
    check_same(streamed, ahead)
    assert list((tmp_path / "small" / "checkpoints").rglob("step-*.json")) == []
