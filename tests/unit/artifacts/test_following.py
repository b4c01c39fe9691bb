"""A driver that follows another one of the same job waits for its lease; a driver of any other job is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_ray.artifacts.lease import FOLLOW_SECONDS, Lease
from dpo_ray.artifacts.process import Process
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import LeaseError
from tests.unit.artifacts.test_lease import ELSEWHERE, Clock, _rewrite

JOB, POD = "research/aligned", "research/aligned-x2b4c-head"


def left_by(storage: Storage, **changes: object) -> None:
    """Leave the lease of a driver of the job in another pod."""
    with Lease(storage, holder="driver 1", job=JOB, pod="research/aligned-k9d8f-head"):
        record = json.loads(storage.read_bytes("lease-000001.json")) | {"process": ELSEWHERE} | changes
    storage.write("lease-000001.json", json.dumps(record).encode())


def follower(storage: Storage, clock: Clock, **changes: Any) -> Lease:
    values: dict[str, Any] = {"job": JOB, "pod": POD}
    return Lease(storage, clock=clock, sleep=clock.sleep, **values | changes)


def beating(storage: Storage, until_seconds: float) -> Clock:
    """Return a clock whose holder writes a heartbeat every 20 s until a moment, and then nothing."""
    beats = 0

    def meanwhile() -> None:
        nonlocal beats
        if clock.slept >= 20 * (beats + 1) and clock.slept <= until_seconds:
            beats += 1
            _rewrite(storage, 1, heartbeats=beats)

    clock = Clock(meanwhile)
    return clock


def test_a_living_driver_of_the_same_job_is_waited_for_until_it_is_silent(storage: Storage) -> None:
    left_by(storage)
    clock, lines = beating(storage, 110), []
    with follower(storage, clock, say=lines.append) as lease:
        assert lease.token == 2
    assert 160 <= clock.slept <= 170
    assert lines[0] == "the run is held by the former driver of this job, driver 1: watching its heartbeat for 60 s"
    assert "waiting for driver 1: its heartbeat has been silent for" in lines[1]
    assert 5 <= len(lines) <= 10


def test_a_former_driver_that_ends_by_itself_is_followed_at_once(storage: Storage) -> None:
    left_by(storage)
    clock = Clock(lambda: _rewrite(storage, 1, released=True))
    with follower(storage, clock) as lease:
        assert lease.token == 2
    assert clock.slept < 6


def test_the_wait_for_a_former_driver_ends(disk: Storage) -> None:
    left_by(disk)
    clock = beating(disk, 1e9)
    with pytest.raises(LeaseError, match="held by driver 1"):
        follower(disk, clock).__enter__()
    assert FOLLOW_SECONDS <= clock.slept <= FOLLOW_SECONDS + 30


@pytest.mark.parametrize("job", ["", "research/another"])
def test_a_driver_of_another_job_is_refused_at_the_next_heartbeat(disk: Storage, job: str) -> None:
    left_by(disk)
    clock = beating(disk, 1e9)
    with pytest.raises(LeaseError, match="held by driver 1"):
        follower(disk, clock, job=job).__enter__()
    assert clock.slept <= 25


def test_two_drivers_without_a_job_do_not_follow_each_other(disk: Storage) -> None:
    left_by(disk, job="")
    with pytest.raises(LeaseError):
        follower(disk, beating(disk, 1e9), job="").__enter__()


@pytest.mark.parametrize(("pod", "seconds"), [(POD, 0), ("research/aligned-k9d8f-head", 60), ("", 60)])
def test_the_driver_of_an_earlier_container_of_this_pod_is_gone(disk: Storage, pod: str, seconds: float) -> None:
    left_by(disk, pod=pod)
    clock = Clock()
    with follower(disk, clock, pod=POD if pod else "") as lease:
        assert lease.token == 2
    assert seconds <= clock.slept <= seconds + 6


def test_a_living_process_of_this_container_is_not_taken_for_gone(disk: Storage) -> None:
    here = vars(Process.current())
    left_by(disk, pod=POD, process=here)
    clock = Clock()
    with follower(disk, clock) as lease:
        assert lease.token == 2
    assert clock.slept >= 60


def test_the_former_driver_stays_fenced(disk: Storage) -> None:
    """It may still run when the follower has taken over: it commits nothing more."""
    clock = Clock()
    with Lease(disk, job=JOB, clock=clock) as former:
        _rewrite(disk, 1, process=ELSEWHERE)
        with follower(disk, clock), pytest.raises(LeaseError, match="lost the run"):
            former.check()
