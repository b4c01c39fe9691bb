"""The schedule on storage: written bucket by bucket, read back step by step from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.data.groups import Group, groups_of
from dpo_ray.schedule import build, files
from dpo_ray.schedule.build import Packing, build_split, pack_step
from dpo_ray.schedule.files import RankStep, read_steps
from dpo_ray.schedule.micro_batch import MicroBatch
from dpo_ray.schedule.order import step_groups
from tests.helpers.schedules import group_table, make_group

GROUPS, GROUPS_PER_STEP, EPOCHS = 37, 5, 3  # 23 steps; epochs end within steps, so groups come twice in a bucket
PACKING = Packing(ranks=2, tokens_per_micro_batch=60)


def order() -> list[list[int]]:
    ids = [make_group(n).group_id for n in range(GROUPS)]
    return list(step_groups(ids, 7, GROUPS_PER_STEP, EPOCHS, None))


@pytest.fixture
def schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Commit a schedule of many buckets, from parts of uneven size, one of them empty."""
    monkeypatch.setattr(files, "FIRST_BUCKET_STEPS", 1)
    monkeypatch.setattr(files, "MOST_BUCKET_STEPS", 4)
    staging = ArtifactStore(Storage(tmp_path)).begin("schedule", "k", "run")
    bounds = [(0, 10), (10, 11), (11, 11), (11, GROUPS)]
    parts = [lambda a=a, b=b: group_table(range(a, b)) for a, b in bounds]
    entries = build_split("train", parts, order(), PACKING, staging)
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows={"train/steps": len(order())}, figures={})


def same_batch(a: MicroBatch, b: MicroBatch) -> bool:
    arrays = [name for name in MicroBatch.__dataclass_fields__ if name not in ("group_ids", "sources")]
    return (a.group_ids, a.sources) == (b.group_ids, b.sources) and all(
        np.array_equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in arrays
    )


def same_step(a: RankStep, b: RankStep) -> bool:
    facts = (a.step, a.step_weight, a.step_tokens) == (b.step, b.step_weight, b.step_tokens)
    batches = zip(a.micro_batches, b.micro_batches, strict=True)
    return facts and all(same_batch(x, y) for x, y in batches)


def expected_steps(rank: int) -> list[RankStep]:
    steps = []
    for number, members in enumerate(order()):
        weight, tokens, ranks = pack_step([make_group(n) for n in members], PACKING)
        steps.append(RankStep(number, weight, tokens, tuple(ranks[rank])))
    return steps


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_read_is_what_was_packed_from_every_start(schedule: Artifact, rank: int) -> None:
    expected = expected_steps(rank)
    assert len(expected) == 23
    assert len(schedule.names(f"train/rank-{rank:05d}/")) == 7  # of 1, 2, 4, 4, 4, 4 and 4 steps
    for start in range(len(expected) + 2):
        steps = list(read_steps(schedule, "train", rank, start))
        assert [s.step for s in steps] == list(range(start, len(expected)))
        assert all(same_step(a, b) for a, b in zip(steps, expected[start:], strict=True))


def test_every_group_is_seen_once_an_epoch(schedule: Artifact) -> None:
    seen = [
        i
        for rank in range(PACKING.ranks)
        for step in read_steps(schedule, "train", rank)
        for batch in step.micro_batches
        if batch.weight.any()
        for i in batch.group_ids
    ]
    ids = [make_group(n).group_id for n in range(GROUPS)]
    assert sorted(seen) == sorted(ids * EPOCHS)


def test_the_same_build_gives_the_same_bytes(schedule: Artifact, tmp_path: Path) -> None:
    staging = ArtifactStore(Storage(tmp_path / "again")).begin("schedule", "k", "run")
    parts = [lambda: group_table(range(GROUPS))]  # other files, same rows
    entries = build_split("train", parts, order(), PACKING, staging)
    assert {e.name: e.sha256 for e in entries} == {e.name: e.sha256 for e in schedule.manifest.files}


def test_no_more_than_one_step_is_turned_to_groups_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[int] = []

    def counted(table: pa.Table) -> Iterator[Group]:
        tables.append(len(table))
        return groups_of(table)

    staging = ArtifactStore(Storage(tmp_path)).begin("schedule", "k", "run")
    parts = [lambda: group_table(range(GROUPS))]
    monkeypatch.setattr(build, "groups_of", counted)
    build_split("train", parts, order(), PACKING, staging)
    assert tables == [len(step) for step in order()]


def test_a_split_without_steps_has_no_files(tmp_path: Path) -> None:
    staging = ArtifactStore(Storage(tmp_path)).begin("schedule", "k", "run")
    assert build_split("eval", [], [], PACKING, staging) == []
