"""The training core reproduces TRL 1.16's curves: same rows, same order, same model, through Ray Train and FSDP2.

The directory with rows, curves and model is GOLDEN_DIR (default ../shared/golden beside the repository).
"""

from __future__ import annotations

import json
import math
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

from . import golden_process

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))
pytestmark = pytest.mark.skipif(not (GOLDEN / "rows.json").exists(), reason=f"no golden curves in {GOLDEN}")

GROUPS_PER_STEP = golden_process.GROUPS_PER_STEP
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
    """Take the sums of the file."""
    return [golden_process.golden_group(i, row).reference_token_logps or () for i, row in enumerate(rows)]


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


NOT_OF_LOSS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")

# What README.md of the golden directory says of each case; every other is the loss of its name at beta 0.1.
CASES: dict[str, dict[str, Any]] = {
    "exo_pair": {"objective": {"type": "exo_pair", "label_smoothing": 1e-3}},
    "robust": {"objective": {"type": "robust", "label_smoothing": 0.1}},
    "sigmoid_norm": {"objective": {"type": "sigmoid_norm", "beta": 0.1}},
    "mpo": {
        "objective": {
            "type": "sum",
            "terms": [
                {"weight": 0.8, "objective": {"type": "sigmoid"}},
                {"weight": 0.2, "objective": {"type": "bco_pair"}},
                {"weight": 1.0, "objective": {"type": "sft"}},
            ],
        }
    },
    "forward_kl": {"shaping": {"divergence": "forward_kl"}},
    "js": {"shaping": {"divergence": "js"}},
    "ld": {"shaping": {"ld_alpha": 0.5}},
    "wpo": {"shaping": {"wpo": True}},
}


def settings_of(case: str) -> dict[str, Any]:
    return {"objective": {"type": case} if case not in CASES else {"type": "sigmoid"}} | CASES.get(case, {})


def curves() -> dict[str, list[dict[str, float]]]:
    path = GOLDEN / "trl-1.16-curves.json"
    return json.loads(path.read_text()) if path.exists() else {}


def assert_matches(measured: list[dict[str, float]], curve: list[dict[str, float]]) -> None:
    """Every metric of every step equals TRL's to a relative 1e-4."""
    assert len(measured) == len(curve)
    # `forward_kl` overflows in TRL in its second step: the loss is reported as 0 and the gradient as NaN, all after is NaN.
    # Here exponents are bounded, and training goes on; what TRL measured before that is compared.
    finite = next((i for i, row in enumerate(curve) if math.isnan(row["grad_norm"])), len(curve))
    curve = [row if i < finite else {n: row[n] for n in NOT_OF_LOSS} for i, row in enumerate(curve[: finite + 1])]
    measured = measured[: len(curve)]
    wrong = [
        f"step {i + 1} {name}: {row[name]:.8g}, TRL {value:.8g}"
        for i, (row, expected) in enumerate(zip(measured, curve, strict=True))
        for name, value in expected.items()
        if abs(row[name] - value) > RELATIVE * abs(value) + ABSOLUTE.get(name, 0.0)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("reference", "workers"),
    [("file", 1), ("file", 2), pytest.param("vllm", 1, marks=pytest.mark.long), ("vllm", 2)],
)
@pytest.mark.parametrize("case", ["sigmoid", "ipo"])
def test_curves(case: str, reference: str, workers: int, references, tokens: Artifact, tmp_path: Path) -> None:
    """Through Ray Train and FSDP2, with the reference from the file and from the pool of engines."""
    schedule = schedule_of(tokens, references[reference], workers, tmp_path)
    assert_matches(train(settings_of(case), workers, schedule, tmp_path), curves()[case])


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, "packed"),
        (2, "shared"),
        pytest.param(1, "shared", marks=pytest.mark.long),
        pytest.param(2, "packed", marks=pytest.mark.long),
    ],
)
def test_all_curves(world: int, layout: str, tmp_path: Path) -> None:
    """Every case of the file, by the same step under FSDP2, in one process and in two, prompts shared and not."""
    settings = {case: settings_of(case) | {"layout": layout} for case in curves()}
    measured = golden_process.run(GOLDEN, settings, world, tmp_path)
    assert measured.keys() == curves().keys()
    failures = []
    for case, curve in curves().items():
        try:
            assert_matches(measured[case], curve)
        except AssertionError as error:
            failures.append(f"{case}: {error}")
    assert not failures, "\n".join(failures)


def train(settings: dict[str, Any], workers: int, schedule: Artifact, root: Path) -> list[dict[str, float]]:
    """Train by the stage itself and return the metrics of the steps."""
    config = TrainConfig(
        workers=workers,
        **settings,
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
