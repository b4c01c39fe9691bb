"""The training core reproduces TRL 1.16's curves: same rows, same order, same model, through Ray Train and FSDP2.

The directory with rows, curves and model is GOLDEN_DIR (default ../shared/golden beside the repository).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.cluster.workers import start_inbox
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.objective import IpoObjective, SigmoidObjective
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.config.train import OptimizerConfig, TrainConfig
from dpo_ray.data.tokens import TOKENS, groups_of, parquet_bytes, read_table
from dpo_ray.models.load import model_identity
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store import Numerics, ReferenceStore
from dpo_ray.schedule.build import Packing, build_split
from dpo_ray.train import stage as train_stage
from dpo_ray.train.task import TrainTask

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))
pytestmark = pytest.mark.skipif(not (GOLDEN / "rows.json").exists(), reason=f"no golden curves in {GOLDEN}")

GROUPS_PER_STEP = 4
RELATIVE = 1e-4
# A reward that is exactly 0 in the curves (step 1, where policy and reference were one forward pass) is here the float32
# rounding of a difference of two sums of hundreds of nats; so is what that leaves in a mean of such rewards.
ABSOLUTE = {"rewards/chosen": 1e-5, "rewards/rejected": 1e-5, "rewards/margins": 1e-5}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "rows.json").read_text())


@pytest.fixture(scope="module")
def tokens(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The rows as a tokens artifact, in their order."""
    staging = ArtifactStore(Storage(tmp_path_factory.mktemp("tokens"))).begin("prepare", "golden", "golden")
    groups = [
        {
            "group_id": number.to_bytes(16, "big"),
            "source": "golden",
            "prompt_ids": row["prompt_ids"],
            "completion_ids": [row["chosen_ids"], row["rejected_ids"]],
            "scores": [1.0, 0.0],
            "chosen": [0],
            "rejected": [1],
            "preference_probability": 1.0,
            "weight": 1.0,
        }
        for number, row in enumerate(rows)
    ]
    table = pa.Table.from_pylist(groups, schema=TOKENS)
    entry = staging.write("train/00000-00000.parquet", parquet_bytes(table), rows=len(table))
    return Provenance(1, {}, {}, {}).commit(staging, [entry], rows={"train/admitted": len(table)}, figures={})


def from_file(rows: list[dict[str, Any]], tokens: Artifact) -> list[tuple[np.ndarray, ...]]:
    """The file has sums only: the first token carries the sum, so that no rounding comes in by spreading it."""

    def first(total: float, length: int) -> np.ndarray:
        values = np.zeros(length, np.float32)
        values[0] = total
        return values

    return [
        (first(r["ref_chosen"], len(r["chosen_ids"])), first(r["ref_rejected"], len(r["rejected_ids"]))) for r in rows
    ]


def from_vllm(rows: list[dict[str, Any]], tokens: Artifact) -> list[tuple[np.ndarray, ...]]:
    """Score with a real engine in the pool, into a store, and read it by key: the stage's own path."""
    model = ModelConfig(path=str(GOLDEN / "tiny-llama"))
    store = ReferenceStore(
        tokens.storage.child("store"), model_identity(model), Numerics("vllm", "test", "cpu", "float32", "float32")
    )
    settings = ScorerSettings("vllm", model.path, "float32", "cpu", 511, 4096, 0.5, share_prompt=True)
    account = reference_stage.score(
        tokens,
        store,
        settings,
        ReferenceConfig(),
        TrainConfig(),
        gpus=0,
        max_unscored_fraction=0,
        advance=lambda groups, words: None,
        say=print,
    )
    assert account.sequences == 2 * len(rows)
    keys = [store.key(r["prompt_ids"], r[name]) for r in rows for name in ("chosen_ids", "rejected_ids")]
    values = [logps.values.to_numpy() for logps in store.fetch(store.index(), keys)]
    return list(zip(values[::2], values[1::2], strict=True))


REFERENCES: dict[str, Callable[..., list[tuple[np.ndarray, ...]]]] = {"file": from_file, "vllm": from_vllm}


@pytest.fixture(scope="module")
def references(ray_cluster: None, rows: list[dict[str, Any]], tokens: Artifact) -> dict[str, Any]:
    return {name: make(rows, tokens) for name, make in REFERENCES.items()}


def schedule_of(tokens: Artifact, reference: list[tuple[np.ndarray, ...]], workers: int, root: Path) -> Artifact:
    """Pack the rows in their order, four a step."""
    staging = ArtifactStore(Storage(root)).begin("schedule", f"golden{workers}", "golden")
    count = len(reference)
    steps = [list(range(s, s + GROUPS_PER_STEP)) for s in range(0, count, GROUPS_PER_STEP)]

    def load() -> pa.Table:
        table = read_table(tokens, "train/00000-00000.parquet")
        return table.append_column("at", pa.array(range(len(table))))

    def groups(table: pa.Table):
        at = table["at"].to_pylist()
        for i, group in zip(at, groups_of(table.drop_columns(["at"])), strict=True):
            yield replace(group, reference_token_logps=reference[i])

    entries = build_split("train", [load], groups, steps, Packing(workers, tokens_per_micro_batch=1200), staging)
    rows = {"train/steps": len(steps), "train/groups": count}
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})


@pytest.mark.parametrize(
    ("reference", "workers"),
    [("file", 1), ("file", 2), pytest.param("vllm", 1, marks=pytest.mark.slow), ("vllm", 2)],
)
@pytest.mark.parametrize("objective", [SigmoidObjective(beta=0.1), IpoObjective(beta=0.1)], ids=lambda o: o.type)
def test_curves(objective, reference: str, workers: int, references, tokens: Artifact, tmp_path: Path) -> None:
    """Every metric of every step equals TRL's to a relative 1e-4."""
    curve = json.loads((GOLDEN / "trl-1.16-curves.json").read_text())[objective.type]
    measured = train(objective, workers, schedule_of(tokens, references[reference], workers, tmp_path), tmp_path)
    assert len(measured) == len(curve)
    wrong = [
        f"step {i + 1} {name}: {row[name]:.8g}, TRL {value:.8g}"
        for i, (row, expected) in enumerate(zip(measured, curve, strict=True))
        for name, value in expected.items()
        if abs(row[name] - value) > RELATIVE * abs(value) + ABSOLUTE.get(name, 0.0)
    ]
    assert not wrong, "\n".join(wrong)


def train(objective, workers: int, schedule: Artifact, root: Path) -> list[dict[str, float]]:
    """Train by the stage itself and return the metrics of the steps."""
    config = TrainConfig(
        workers=workers,
        objective=objective,
        steps=schedule.manifest.rows["train/steps"],
        groups_per_step=GROUPS_PER_STEP,
        optimizer=OptimizerConfig(learning_rate=1e-3, decay="constant", warmup_fraction=0, max_grad_norm=1.0),
        checkpoint_every_steps=None,
    )
    task = TrainTask(
        model=ModelConfig(path=str(GOLDEN / "tiny-llama")),
        config=config,
        dtype="float32",
        template="plain",
        schedule=schedule,
        checkpoints=Storage(root / "checkpoints"),
        staging=ArtifactStore(Storage(root)).begin("train", "golden", "golden"),
        inbox=start_inbox(),
        audit=None,
    )
    seen: list[dict[str, Any]] = []
    account = train_stage.run(task, 0.0, seen.append)
    assert account["steps"] == config.steps
    stored = [json.loads(line) for line in task.staging.storage.read_bytes("metrics.jsonl").splitlines()]
    assert [row for row in seen if "restored_step" not in row] == stored
    return stored
