"""The feed: a file is given when it was announced and not before; a failure comes to all ranks at the same bucket."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.errors import TrainError
from dpo_ray.schedule.files import bucket_ranges, file_name
from dpo_ray.schedule.live import Feed

STAGING = Storage("/staging")
RANKS = 3


def names(first_step: int, split: str = "train") -> list[str]:
    return [file_name(split, rank, first_step) for rank in range(RANKS)]


events = st.lists(
    st.one_of(
        st.tuples(st.just("announce"), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, RANKS - 1)),
        st.tuples(st.just("fail"), st.just(0)),
    ),
    max_size=60,
)


@given(events)
def test_ranks_read_what_was_announced_and_end_together(happening: list[tuple[str, int]]) -> None:
    """Ranks open the buckets in order, each at its own pace, while buckets are announced, until scoring fails."""

    async def follow() -> None:
        feed, firsts = Feed(STAGING), [b.start for b in bucket_ranges(10_000)]
        announced, opened, failed = 0, [0] * RANKS, False
        ends: dict[int, int] = {}  # by rank, the buckets that it had read when it met the failure
        reads = [("read", rank) for rank in range(RANKS) for _ in range(60)]
        for what, rank in [*happening, ("fail", 0), *reads]:
            if what == "announce" and not failed:
                await feed.announce(names(firsts[announced]))
                announced += 1
            elif what == "fail":
                failed = True
                await feed.fail("an engine broke")
            elif what == "read" and rank not in ends:
                answer = await feed.locate(file_name("train", rank, firsts[opened[rank]]), 0)
                if isinstance(answer, TrainError):
                    assert failed
                    ends[rank] = opened[rank]
                elif answer is None:
                    assert not failed
                    assert opened[rank] == announced
                else:
                    assert answer == STAGING
                    assert opened[rank] < announced
                    opened[rank] += 1
        assert len(ends) == RANKS
        assert len(set(ends.values())) == 1

    asyncio.run(follow())


def test_a_reader_waits_for_its_file() -> None:
    async def follow() -> None:
        feed = Feed(STAGING)
        reading = asyncio.create_task(feed.locate(names(4)[0], 30))
        await feed.announce(names(0))
        await asyncio.sleep(0.05)
        assert not reading.done()
        await feed.announce(names(4))
        assert await asyncio.wait_for(reading, 10) == STAGING

    asyncio.run(follow())


def test_a_reader_that_waits_hears_of_a_failure() -> None:
    async def follow() -> None:
        feed = Feed(STAGING)
        reading = asyncio.create_task(feed.locate(names(0)[0], 30))
        await asyncio.sleep(0.01)
        await feed.fail("no engine starts")
        error = await asyncio.wait_for(reading, 10)
        with pytest.raises(TrainError, match="no engine starts"):
            raise error if isinstance(error, TrainError) else AssertionError(error)

    asyncio.run(follow())


def test_a_held_out_split_that_was_read_stays_open_after_a_failure() -> None:
    async def follow() -> None:
        feed = Feed(STAGING)
        await feed.announce(names(0, "eval"))
        assert await feed.locate(names(0, "eval")[0], 0) == STAGING
        await feed.fail("later")
        assert [await feed.locate(name, 0) for name in names(0, "eval")] == [STAGING] * RANKS

    asyncio.run(follow())


def test_a_bucket_that_no_rank_has_begun_is_closed_to_all_by_a_failure() -> None:
    """Otherwise one rank would train a step for which others get no file, and they would wait for one another."""

    async def follow() -> None:
        feed = Feed(STAGING)
        first, second = (bucket.start for bucket in bucket_ranges(100)[:2])
        for start in (first, second):
            await feed.announce(names(start))
        assert await feed.locate(names(first)[0], 0) == STAGING
        await feed.fail("no engine starts")
        assert [await feed.locate(name, 0) for name in names(first)] == [STAGING] * RANKS
        assert all([isinstance(await feed.locate(name, 0), TrainError) for name in names(second)])

    asyncio.run(follow())


def test_a_commit_moves_the_files(tmp_path: Path) -> None:
    staging = ArtifactStore(Storage(tmp_path)).begin("schedule", "k", "run")
    entries = [staging.write(name, b"content") for name in names(0)]

    async def follow() -> None:
        feed = Feed(staging.storage)
        await feed.announce(names(0))
        assert await feed.locate(names(0)[1], 0) == staging.storage
        artifact = Provenance(1, {}, {}, {}).commit(staging, entries, rows={}, figures={})
        await feed.move(artifact)
        assert await feed.locate(names(0)[1], 0) == artifact

    asyncio.run(follow())
