"""A schedule that was packed for more ranks than there are is read whole, and by all ranks in step."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.schedule.build import Packing, pack_step
from dpo_ray.schedule.files import RankStep, bucket_ranges, file_name, read_share, step_table
from tests.helpers.schedules import make_group

GROUPS_PER_STEP, TOKENS = 6, 40


@dataclass
class Files:
    """A schedule in memory."""

    files: dict[str, bytes]
    rows: dict[str, int]

    def open(self, name: str) -> io.BytesIO:
        return io.BytesIO(self.files[name])


def packed(steps: int, ranks: int, seed: int) -> Files:
    groups = [make_group(1000 * seed + i) for i in range(steps * GROUPS_PER_STEP)]
    done = [pack_step(groups[i * GROUPS_PER_STEP :][:GROUPS_PER_STEP], Packing(ranks, TOKENS)) for i in range(steps)]
    files = {}
    for rank in range(ranks):
        for bucket in bucket_ranges(steps):
            sink = io.BytesIO()
            shares = [RankStep(s, done[s][0], done[s][1], tuple(done[s][2][rank])) for s in bucket]
            with pq.ParquetWriter(sink, step_table(shares[0]).schema) as writer:
                for share in shares:
                    writer.write_table(step_table(share))
            files[file_name("train", rank, bucket.start)] = sink.getvalue()
    return Files(files, {"train/steps": steps})


def group_ids(share: RankStep) -> list[bytes]:
    return [g for m in share.micro_batches for g, weight in zip(m.group_ids, m.weight, strict=True) if weight]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.data(), st.integers(0, 99))
def test_fewer_ranks_do_the_same_steps(steps: int, packed_ranks: int, data: st.DataObject, seed: int) -> None:
    ranks, start = data.draw(st.integers(1, packed_ranks)), data.draw(st.integers(0, steps))
    schedule = packed(steps, packed_ranks, seed)
    whole = [list(read_share(schedule, "train", r, packed_ranks, packed_ranks, start)) for r in range(packed_ranks)]
    fewer = [list(read_share(schedule, "train", r, ranks, packed_ranks, start)) for r in range(ranks)]
    assert [len(shares) for shares in fewer] == [steps - start] * ranks
    for step in range(steps - start):
        mine, theirs = [shares[step] for shares in fewer], [shares[step] for shares in whole]
        assert len({len(share.micro_batches) for share in mine}) == 1  # collectives need it
        assert {(s.step, s.step_weight, s.step_tokens) for s in mine} == {
            (s.step, s.step_weight, s.step_tokens) for s in theirs
        }
        assert Counter(g for s in mine for g in group_ids(s)) == Counter(g for s in theirs for g in group_ids(s))


@pytest.mark.parametrize(("ranks", "most"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_the_work_is_spread_as_evenly_as_packed_ranks_allow(ranks: int, most: int) -> None:
    schedule = packed(2, 4, 0)
    (one, *_) = read_share(schedule, "train", 0, 4, 4)
    for rank in range(ranks):
        (share, *_) = read_share(schedule, "train", rank, ranks, 4)
        assert len(share.micro_batches) == most * len(one.micro_batches)
