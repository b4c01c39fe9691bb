"""The training core reproduces TRL 1.16's curves: same rows, same order, same model, through Ray Train and FSDP2.

tolerance.py states how close is close enough.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.cluster.workers import start_inbox
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.config.train import OptimizerConfig, TrainConfig
from dpo_ray.data.schemas import TOKENS
from dpo_ray.models.load import model_identity
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore
from dpo_ray.schedule.build import Packing, build_split
from dpo_ray.train import stage as train_stage
from dpo_ray.train.task import TrainTask
from tests.helpers.role_resources import ENGINE, WORKER

from . import golden_process
from .curves import GOLDEN, curves, is_there, settings_of
from .curves import rows as golden_rows
from .tolerance import amplifies, differences, widenings
from .trained import DRAWS, PLANTED, Trained, train_cases

pytestmark = [
    pytest.mark.skipif(not is_there(), reason=f"no golden curves in {GOLDEN}"),
    pytest.mark.timeout(600),  # the first test trains all curves
]

GROUPS_PER_STEP = golden_process.GROUPS_PER_STEP


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return golden_rows()


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
        request=ENGINE,
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
def reference_of(ray_cluster: None, rows: list[dict[str, Any]], tokens: Artifact) -> Callable[..., Any]:
    """Make a reference of REFERENCES when a test first asks for it."""
    return functools.cache(lambda name: REFERENCES[name](rows, tokens))


def schedule_of(tokens: Artifact, reference: list[tuple[np.ndarray, ...]], workers: int, root: Path) -> Artifact:
    """Pack the rows in their order, four a step."""
    staging = ArtifactStore(Storage(root)).begin("schedule", f"golden{workers}", "golden")
    count = len(reference)
    steps = [list(range(s, s + GROUPS_PER_STEP)) for s in range(0, count, GROUPS_PER_STEP)]

    def load() -> pa.Table:
        table = read_table(tokens, "train/00000-00000.parquet")
        return table.append_column("token_logps", pa.array(reference, pa.list_(pa.list_(pa.float32()))))

    entries = build_split("train", [load], steps, Packing(workers, tokens_per_micro_batch=1200), staging)
    rows = {"train/steps": len(steps), "train/groups": count}
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every case by one process and by two, from moved weights, and with planted errors."""
    return train_cases(
        tmp_path_factory.mktemp("trained"), alone="shared", together="packed", draws=DRAWS, errors=PLANTED
    )


@pytest.fixture(scope="module")
def trained_in_other_layouts(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_cases(tmp_path_factory.mktemp("other-layouts"), alone="packed", together="shared")


@pytest.mark.parametrize(
    ("case", "reference", "workers"),
    [
        pytest.param("ipo", "vllm", 2, marks=pytest.mark.slow),
        *(
            pytest.param(*rest, marks=pytest.mark.long)
            for rest in itertools.product(("sigmoid", "ipo"), ("file", "vllm"), (1, 2))
            if rest != ("ipo", "vllm", 2)
        ),
    ],
)
def test_curves(case: str, reference: str, workers: int, reference_of, tokens: Artifact, tmp_path: Path) -> None:
    """Through Ray Train and FSDP2, with the reference from the file and from the pool of engines.

    Neither curve amplifies rounding (docs/testing.md), so the plain tolerance holds at every step.
    """
    schedule = schedule_of(tokens, reference_of(reference), workers, tmp_path)
    measured = train(settings_of(case), workers, schedule, tmp_path)
    wrong = differences(measured, curves()[case], [1.0] * len(measured))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, "shared"),
        (2, "packed"),
        pytest.param(1, "packed", marks=pytest.mark.long),
        pytest.param(2, "shared", marks=pytest.mark.long),
    ],
)
def test_all_curves(world: int, layout: str, trained: Trained, request: pytest.FixtureRequest) -> None:
    """Every case of the file, by the same step under FSDP2, in one process and in two, prompts shared and not."""
    is_default = (world, layout) in ((1, "shared"), (2, "packed"))
    measured = trained if is_default else request.getfixturevalue("trained_in_other_layouts")
    measured = measured.alone if world == 1 else measured.together
    assert measured.keys() == curves().keys()
    wrong = [
        f"{case}: {line}"
        for case, curve in curves().items()
        for line in differences(measured[case], curve, widenings(trained.movements(case)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("error", PLANTED)
def test_an_error_of_one_part_in_10_000_is_caught(error: str, trained: Trained) -> None:
    """A wrong loss, or a gradient, beta or label smoothing that is not the loss's, shows in the first step of every curve.

    That is before any curve has amplified anything, so the plain tolerance holds.
    """
    with_error = trained.with_error[error]
    assert len(with_error) >= (10 if error == "label smoothing" else len(curves()))
    unseen = [case for case, steps in with_error.items() if not differences(steps, curves()[case][:1], [1.0])]
    assert not unseen


def test_few_curves_amplify_rounding(trained: Trained) -> None:
    """The tolerance of most curves is the plain one at every step; in the first step it is that of every curve, nearly."""
    amplifying = [case for case in curves() if amplifies(trained.movements(case))]
    assert len(amplifying) < len(curves()) / 2, amplifying


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
        cpus=1,
    )
    seen: list[dict[str, Any]] = []
    account = train_stage.run(task, WORKER, seen.append)
    assert account["steps"] == config.steps
    stored = [json.loads(line) for line in task.staging.storage.read_bytes("metrics.jsonl").splitlines()]
    assert [row for row in seen if "restored_step" not in row] == stored
    return stored
