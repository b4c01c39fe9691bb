"""Buckets packed in Ray tasks: the files are those of one process, in the same order."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.schemas import TOKENS
from dpo_ray.schedule import stage

TRAIN = TrainConfig(workers=2, groups_per_step=3, epochs=2, tokens_per_micro_batch=60)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def begin(root: Path, what: str) -> Staging:
    return ArtifactStore(Storage(root)).begin(what, "k", "run")


@pytest.fixture
def tokens(tmp_path: Path) -> Artifact:
    """Commit 120 groups to train on, in three parts, and 20 that are held out."""
    staging, entries = begin(tmp_path / "tokens", "prepare"), []
    for name, numbers in {"train/0": range(50), "train/1": range(50, 55), "train/2": range(55, 120)}.items():
        entries.append(written(staging, name, numbers))
    entries.append(written(staging, "eval/0", range(200, 220)))
    rows = {"train/admitted": 120, "eval/admitted": 20}
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})


def written(staging: Staging, name: str, numbers: range):
    rows = [
        {
            "group_id": number.to_bytes(16, "big"),
            "source": "made",
            "prompt_ids": [number, *range(number % 5)],
            "completion_ids": [[number, 2], [*range(number % 7), 2]],
            "scores": [1.0, 0.0],
            "chosen": [0],
            "rejected": [1],
            "preference_probability": 1.0,
            "weight": 1.0,
        }
        for number in numbers
    ]
    return staging.write(f"{name}.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema=TOKENS)), rows=len(rows))


def schedule_of(tokens: Artifact, root: Path) -> Artifact:
    return stage.run(tokens, None, TRAIN, 0, begin(root, "schedule"), Provenance(1, {}, {}, {}))


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_the_files_are_those_of_one_process(
    tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    here = schedule_of(tokens, tmp_path / "here")
    monkeypatch.setattr(stage, "MOST_GROUPS_HERE", 30)  # what is held out is packed in the process
    monkeypatch.setattr(stage, "MOST_PACKED_AT_ONCE", at_once)
    monkeypatch.setattr(stage, "build_split", only_held_out(stage.build_split))
    there = schedule_of(tokens, tmp_path / "there")
    assert len(here.names("train/rank-00001/")) == 5  # of 4, 8, 16, 32 and 20 steps
    assert there.manifest.files == here.manifest.files
    assert there.manifest.rows == here.manifest.rows


def only_held_out(build):
    def checked(split, *rest):
        assert split == "eval"
        return build(split, *rest)

    return checked


def test_an_error_in_a_task_is_raised(tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object):
        raise ValueError("refused")

    monkeypatch.setattr(stage, "MOST_GROUPS_HERE", 30)
    monkeypatch.setattr(stage, "write_bucket", refuse)
    with pytest.raises(ValueError, match="refused"):
        schedule_of(tokens, tmp_path)
    assert not (tmp_path / "schedule-k").exists()
