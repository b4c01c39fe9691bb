"""Buckets: every step in exactly one, the first ones small, and micro-batches that do not depend on their sizes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.errors import TrainError
from dpo_ray.schedule import files
from dpo_ray.schedule.build import Packing, build_split
from dpo_ray.schedule.files import bucket_ranges, file_name, most_bucket_steps, parse_file_name, read_steps
from tests.helpers.schedules import group_table
from tests.unit.schedule.test_build import same_step


@given(st.integers(0, 100_000), st.integers(1, 128))
def test_every_step_is_in_one_bucket(steps: int, most: int) -> None:
    buckets = bucket_ranges(steps, most)
    assert [i for bucket in buckets for i in bucket] == list(range(steps))
    assert max(map(len, buckets), default=0) <= most


@pytest.mark.parametrize(
    ("steps", "sizes"),
    [
        (0, []),
        (1, [1]),
        (4, [4]),
        (5, [4, 1]),
        (12, [4, 8]),
        (252, [4, 8, 16, 32, 64, 128]),
        (600, [4, 8, 16, 32, 64, 128, 128, 128, 92]),
    ],
)
def test_buckets_grow_to_128_steps(steps: int, sizes: list[int]) -> None:
    assert [len(bucket) for bucket in bucket_ranges(steps)] == sizes


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1] * 14), (3, [3, 3, 3, 3, 2]), (5, [4, 5, 5]), (8, [4, 8, 2]), (127, [4, 8, 2])],
)
def test_buckets_of_large_steps_have_fewer(most: int, sizes: list[int]) -> None:
    assert [len(bucket) for bucket in bucket_ranges(14, most)] == sizes


@pytest.mark.parametrize(
    ("groups_per_step", "most"),
    [(1, 128), (512, 128), (2048, 128), (2049, 127), (32_768, 8), (131_073, 1), (262_144, 1), (1_000_000, 1)],
)
def test_a_bucket_has_as_many_steps_as_fit_and_at_least_one(groups_per_step: int, most: int) -> None:
    whole = range(groups_per_step)
    assert most_bucket_steps([whole, whole, range(1)]) == most  # the last step may be short


def test_without_steps_there_is_nothing_to_bound() -> None:
    assert most_bucket_steps([]) == 128


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_more_steps_change_the_last_bucket_alone(steps: int, more: int) -> None:
    few, many = bucket_ranges(steps), bucket_ranges(steps + more)
    assert few[:-1] == many[: max(0, len(few) - 1)]


@given(st.sampled_from(["train", "eval", "eval_a"]), st.integers(0, 99_999), st.integers(0, 999_999_999))
def test_names_of_files_say_what_they_hold(split: str, rank: int, step: int) -> None:
    assert parse_file_name(file_name(split, rank, step)) == (split, rank, step)


def built(root: Path, steps: list[list[int]], packing: Packing, groups: int) -> Artifact:
    staging = ArtifactStore(Storage(root)).begin("schedule", "k", "run")
    halves = [range(groups // 2), range(groups // 2, groups)]
    parts = [lambda rows=rows: group_table(rows) for rows in halves]
    entries = build_split("train", parts, steps, packing, staging)
    rows = {"train/steps": len(steps), "train/bucket_steps": most_bucket_steps(steps)}
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True), max_size=20),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 100),
    st.integers(0, 22),
)
def test_the_micro_batches_are_the_same_whatever_the_buckets(steps, ranks, first, most, groups, start) -> None:
    packing = Packing(ranks, tokens_per_micro_batch=60)

    def read(sizes: tuple[int, int, int]) -> list[list]:
        with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "FIRST_BUCKET_STEPS", sizes[0])
            patch.setattr(files, "MOST_BUCKET_STEPS", sizes[1])
            patch.setattr(files, "MOST_BUCKET_GROUPS", sizes[2])
            schedule = built(Path(root), steps, packing, 12)
            return [list(read_steps(schedule, "train", rank, start)) for rank in range(ranks)]

    for one, other in zip(read((4, 128, 262_144)), read((first, most, groups)), strict=True):
        assert [s.step for s in one] == list(range(start, len(steps)))
        assert all(same_step(a, b) for a, b in zip(one, other, strict=True))


def test_a_schedule_says_how_many_steps_its_buckets_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read as it was written, whatever the bound is by then."""
    steps = [[i, i + 1, i + 2] for i in range(10)]
    monkeypatch.setattr(files, "MOST_BUCKET_GROUPS", 7)
    schedule = built(tmp_path, steps, Packing(1, 60), 12)
    assert [parse_file_name(name)[2] for name in schedule.names()] == [0, 2, 4, 6, 8]
    monkeypatch.undo()
    assert [s.step for s in read_steps(schedule, "train", 0, 3)] == list(range(3, 10))


def test_a_schedule_that_does_not_say_has_buckets_of_128_steps(tmp_path: Path) -> None:
    schedule = built(tmp_path, [[i % 12] for i in range(20)], Packing(1, 60), 12)
    unsaid = {"train/steps": schedule.rows["train/steps"]}
    old = replace(schedule, manifest=schedule.manifest.model_copy(update={"rows": unsaid}))
    assert [s.step for s in read_steps(old, "train", 0, 5)] == list(range(5, 20))


@dataclass
class PartOf:
    """A schedule of which the files of some buckets alone are there."""

    whole: Artifact
    there: set[int]  # first steps
    opened: list[str] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, int]:
        return self.whole.rows

    def open(self, name: str) -> BinaryIO:
        self.opened.append(name)
        if parse_file_name(name)[2] not in self.there:
            raise TrainError("not there")
        return self.whole.open(name)


@pytest.mark.parametrize("start", [0, 3, 4, 11, 12])
@pytest.mark.parametrize("there", [[], [0], [0, 4], [4, 12], [0, 4, 12]])
def test_steps_come_from_files_that_are_there_and_earlier_files_are_not_opened(
    tmp_path: Path, start: int, there: list[int]
) -> None:
    schedule = PartOf(built(tmp_path, [[i % 12] for i in range(20)], Packing(2, 60), 12), set(there))
    got: list[int] = []
    needed = [bucket for bucket in (range(4), range(4, 12), range(12, 20)) if bucket.stop > start]
    readable = list(takewhile(lambda bucket: bucket.start in there, needed))

    def read() -> None:
        got.extend(share.step for share in read_steps(schedule, "train", 1, start))  # keeps what came before an error

    if readable == needed:
        read()
    else:
        with pytest.raises(TrainError, match="not there"):
            read()
    assert got == [step for bucket in readable for step in bucket if step >= start]
    assert [parse_file_name(name)[2] for name in schedule.opened] == [b.start for b in needed[: len(readable) + 1]]
