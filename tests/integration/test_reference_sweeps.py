"""What a sweep costs: the store is asked by content, so only what is new in model, numerics or tokens is scored."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.schemas import splits
from dpo_ray.data.synthetic import preference_pairs
from dpo_ray.models.load import model_directory
from dpo_ray.observe.progress import Reporter
from dpo_ray.run import stages
from dpo_ray.run.context import open_run
from dpo_ray.run.planning import make_plan
from tests.integration.conftest import small_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS, NEW_ROWS = 40, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the shards, the runs and the store; the first run has scored the first shard."""
    place = tmp_path_factory.mktemp("sweeps")
    write_shard(place / "data" / "0.jsonl", 0, ROWS)
    tokens, reference = referenced(recipe(place))
    assert reference.manifest.figures["sequences"] == sequences(tokens) == 2 * groups(tokens)
    assert reference.manifest.figures["found"] == 0
    return place


def write_shard(path: Path, first: int, rows: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pairs = islice(preference_pairs(ROWS + NEW_ROWS, 0, "train"), first, first + rows)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def recipe(place: Path, *overrides: str) -> Recipe:
    data = (
        f"data.train={place}/data/*.jsonl",
        "data.eval=[]",
        "train.eval_every_steps=null",
        "data.max_quarantined_fraction=1",
    )
    return small_recipe(place / "out", f"reference.store={place}/store", *data, *overrides)


def referenced(recipe: Recipe) -> tuple[Artifact, Artifact]:
    """Run the stages up to `reference`; returns their artifacts."""
    with open_run(recipe, make_plan(recipe), Reporter(), verbose=False) as run:
        tokens = stages.prepare(run)
        return tokens, stages.reference(run, tokens)


def groups(tokens: Artifact) -> int:
    return sum(tokens.manifest.rows[f"{split}/admitted"] for split in splits(tokens))


def sequences(tokens: Artifact) -> int:
    """Count the different sequences of an artifact."""
    return len(
        {
            (tuple(row["prompt_ids"]), tuple(completion))
            for name in tokens.names("train/")
            for row in read_table(tokens, name).to_pylist()
            for completion in row["completion_ids"]
        }
    )


@pytest.mark.parametrize(
    "override",
    [
        "train.objective={type: ipo}",
        "train.objective.beta=0.3",
        "train.optimizer.learning_rate=1e-5",
        "train.epochs=3",
        "seed=7",
    ],
)
def test_what_only_training_depends_on_scores_nothing(override: str, place: Path) -> None:
    changed = recipe(place, override)
    assert make_plan(changed).stages["reference"].state == "done"
    for artifact in (place / "out" / "artifacts").glob("reference-*"):
        shutil.rmtree(artifact)  # and where it is not, the store has it all
    tokens, reference = referenced(changed)
    assert reference.manifest.figures["sequences"] == reference.manifest.figures["engines"] == 0
    assert reference.manifest.figures["found"] == 2 * groups(tokens)


@pytest.mark.slow
def test_new_rows_cost_only_themselves(place: Path) -> None:
    shutil.copytree(place / "data", place / "more")
    write_shard(place / "more" / "1.jsonl", ROWS, NEW_ROWS)
    tokens, reference = referenced(recipe(place, f"data.train={place}/more/*.jsonl"))
    assert groups(tokens) == ROWS + NEW_ROWS
    assert reference.manifest.figures["sequences"] == 2 * NEW_ROWS
    assert reference.manifest.figures["found"] == 2 * ROWS


def other_model(place: Path) -> Path:
    """Copy the model, and change one weight by the least."""
    directory = place / "model"
    shutil.copytree(model_directory(ModelConfig(path="builtin:sentiment_llama")), directory)
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name] = weights[name].copy()
    weights[name].flat[0] = np.nextafter(weights[name].flat[0], np.float32(np.inf), dtype=weights[name].dtype)
    save_file(weights, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("model", marks=pytest.mark.slow),
        *(pytest.param(change, marks=pytest.mark.long) for change in ("dtype", "truncation", "engine")),
    ],
)
def test_another_model_dtype_truncation_or_engine_never_hits(change: str, place: Path) -> None:
    overrides = {
        "model": lambda: f"model.path={other_model(place)}",
        "dtype": lambda: "model.dtype=bfloat16",
        "truncation": lambda: "data.max_length_tokens=34",  # cuts every sequence of these rows
        "engine": lambda: "reference.engine=trainer",
    }
    tokens, reference = referenced(recipe(place, overrides[change]()))
    assert reference.manifest.figures["found"] == 0
    assert reference.manifest.figures["sequences"] == sequences(tokens) > 0
