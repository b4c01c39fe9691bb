"""Buckets: every step in exactly one, the first ones small, and micro-batches that do not depend on their sizes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.errors import TrainError
from dpo_ray.schedule import records
from dpo_ray.schedule.build import Packing, build_split
from dpo_ray.schedule.records import bucket_ranges, file_name, parse_file_name, read_steps

from .test_build import same_step, to_groups


@given(st.integers(0, 100_000))
def test_every_step_is_in_one_bucket(steps: int) -> None:
    assert [i for bucket in bucket_ranges(steps) for i in bucket] == list(range(steps))


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
    parts = [lambda rows=rows: pa.table({"number": pa.array(rows, pa.int64())}) for rows in halves]
    entries = build_split("train", parts, to_groups, steps, packing, staging)
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows={"train/steps": len(steps)}, figures={})


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True), max_size=20),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(0, 22),
)
def test_the_micro_batches_are_the_same_whatever_the_buckets(steps, ranks, first, most, start) -> None:
    packing = Packing(ranks, tokens_per_micro_batch=60)

    def read(sizes: tuple[int, int]) -> list[list]:
        with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "FIRST_BUCKET_STEPS", sizes[0])
            patch.setattr(records, "MOST_BUCKET_STEPS", sizes[1])
            schedule = built(Path(root), steps, packing, 12)
            return [list(read_steps(schedule, "train", rank, start)) for rank in range(ranks)]

    for one, other in zip(read((4, 128)), read((first, most)), strict=True):
        assert [s.step for s in one] == list(range(start, len(steps)))
        assert all(same_step(a, b) for a, b in zip(one, other, strict=True))


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
