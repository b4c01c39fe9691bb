"""A worker's view of a schedule that is being written, through the feed's actor on real Ray."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.cluster.workers import start_inbox
from dpo_ray.errors import TrainError
from dpo_ray.schedule.files import file_name
from dpo_ray.schedule.live import ASK_SECONDS, LiveSchedule

pytestmark = pytest.mark.usefixtures("ray_cluster")

FIRST, SECOND = file_name("train", 0, 0), file_name("train", 0, 4)


def started(tmp_path: Path) -> tuple[LiveSchedule, Staging]:
    staging = ArtifactStore(Storage(tmp_path)).begin("schedule", "k", "run")
    return LiveSchedule.start({"train/steps": 12, "train/groups": 96}, staging.storage, start_inbox()), staging


def read(live: LiveSchedule, name: str) -> bytes:
    with live.open(name) as stream:
        return stream.read()


def test_a_worker_waits_says_so_and_reads_where_the_file_is_by_then(tmp_path: Path) -> None:
    live, staging = started(tmp_path)
    entries = [staging.write(FIRST, b"first"), staging.write(SECOND, b"second")]
    live.announce([FIRST])
    assert read(live, FIRST) == b"first"
    with ThreadPoolExecutor(1) as worker:
        reading = worker.submit(read, live, SECOND)
        with pytest.raises(TimeoutError):
            reading.result(ASK_SECONDS + 3)  # it is written, but not announced
        assert ray.get(live.inbox.take.remote()) == [{"waiting_for": "train", "step": 5}]
        live.announce([SECOND])
        assert reading.result(60) == b"second"
    artifact = Provenance(1, {}, {}, {}).commit(staging, entries, rows={}, figures={})
    assert not staging.storage.exists(FIRST)
    with ThreadPoolExecutor(1) as worker:
        reading = worker.submit(read, live, FIRST)  # of a worker that begins again between the commit and its news
        with pytest.raises(TimeoutError):
            reading.result(1)
        live.move(artifact)
        assert reading.result(60) == b"first"


def test_a_failure_ends_the_waiting_and_leaves_what_was_begun(tmp_path: Path) -> None:
    live, staging = started(tmp_path)
    staging.write(FIRST, b"first")
    live.announce([FIRST])
    read(live, FIRST)
    with ThreadPoolExecutor(1) as worker:
        reading = worker.submit(read, live, SECOND)
        live.fail("engines die again and again")
        with pytest.raises(TrainError, match="engines die again and again"):
            reading.result(60)
    assert read(live, FIRST) == b"first"
