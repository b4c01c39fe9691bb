from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from dpo_ray.artifacts.lease import Lease, is_free
from dpo_ray.artifacts.process import Process
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError, LeaseError


def test_the_token_grows_and_one_file_is_left(storage: Storage) -> None:
    tokens = []
    for _ in range(3):
        with Lease(storage) as lease:
            tokens.append(lease.token)
            lease.check()
    assert tokens == [1, 2, 3]
    assert storage.list_files() == ["lease-000003.json"]


def test_a_living_holder_is_named(storage: Storage) -> None:
    with Lease(storage):
        with pytest.raises(LeaseError) as caught, Lease(storage):
            pass
        assert f"{socket.gethostname()} pid {os.getpid()} since 20" in caught.value.what
        assert "lease-000001.json" in caught.value.where
        assert "silent for 60 s" in caught.value.fix
    with Lease(storage, holder="night run") as lease:
        assert lease.token == 2
        with pytest.raises(LeaseError, match="held by night run"):
            Lease(storage).__enter__()


def test_an_error_in_the_body_passes_and_releases(storage: Storage) -> None:
    with pytest.raises(KeyError), Lease(storage):
        raise KeyError("x")
    with Lease(storage):
        pass


def _hold_forever(uri: str, connection) -> None:
    with Lease(Storage(uri), ttl_seconds=600):
        connection.send("held")
        time.sleep(60)


def test_the_lease_of_a_killed_process_is_free_at_once(disk: Storage) -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_hold_forever, args=(disk.uri, theirs))
    holder.start()
    assert ours.recv() == "held"
    with pytest.raises(LeaseError, match=f"pid {holder.pid} "):
        Lease(disk).__enter__()
    assert holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead but not reaped: a zombie counts as gone
    started = time.monotonic()
    with Lease(disk) as lease:
        assert lease.token == 2
    assert time.monotonic() - started < 2
    holder.join()


def _contend(uri: str, start, done, results) -> None:
    start.wait()
    try:
        with Lease(Storage(uri)) as lease:
            results.put(("won", lease.token))
            done.wait(30)
    except LeaseError as error:
        results.put(("lost", str(error)))


def test_of_eight_contending_processes_exactly_one_wins(disk: Storage) -> None:
    context = get_context("fork")
    for round_number in range(3):
        start, done, results = context.Barrier(8), context.Event(), context.Queue()
        arguments = (disk.uri, start, done, results)
        contenders = [context.Process(target=_contend, args=arguments) for _ in range(8)]
        for contender in contenders:
            contender.start()
        got = [results.get(timeout=30) for _ in contenders]
        done.set()
        for contender in contenders:
            contender.join(30)
            assert contender.exitcode == 0
        assert [token for outcome, token in got if outcome == "won"] == [round_number + 1]
        assert all("is held by" in text for outcome, text in got if outcome == "lost")


def test_of_contending_threads_on_one_bucket_exactly_one_wins(s3: Storage) -> None:
    start, done, outcomes = threading.Barrier(4), threading.Event(), []

    def contend() -> None:
        start.wait()
        try:
            with Lease(s3) as lease:
                outcomes.append(lease.token)
                done.wait(30)
        except LeaseError:
            outcomes.append(0)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 4:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [0, 0, 0, 1]


def _rewrite(storage: Storage, number: int, **changes: object) -> None:
    name = f"lease-{number:06d}.json"
    storage.write(name, json.dumps(json.loads(storage.read_bytes(name)) | changes).encode())


class Clock:
    """The seconds since a machine was started; sleeping passes at once, and `meanwhile` happens during it."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now, self.slept, self._meanwhile = 1000.0, 0.0, meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now, self.slept = self.now + seconds, self.slept + seconds
        self._meanwhile()


def _contender(storage: Storage, clock: Clock) -> Lease:
    return Lease(storage, clock=clock, sleep=clock.sleep)


ELSEWHERE = {"host": "elsewhere", "boot": "b", "pid": 1, "started": "1"}


def _elsewhere(storage: Storage, **changes: object) -> None:
    """Leave the lease of a process of another machine."""
    with Lease(storage, holder="user@elsewhere pid 1"):
        record = json.loads(storage.read_bytes("lease-000001.json")) | {"process": ELSEWHERE} | changes
    storage.write("lease-000001.json", json.dumps(record).encode())


def test_the_lease_of_another_machine_is_free_after_a_time_to_live_of_silence(storage: Storage) -> None:
    _elsewhere(storage)
    clock = Clock()
    with _contender(storage, clock) as lease:
        assert lease.token == 2
    assert 60 <= clock.slept <= 66


def test_a_holder_elsewhere_that_writes_its_heartbeat_is_refused_at_its_next_one(storage: Storage) -> None:
    _elsewhere(storage)
    beats = 0

    def meanwhile() -> None:
        nonlocal beats
        if clock.slept >= 20 * (beats + 1):
            beats += 1
            _rewrite(storage, 1, heartbeats=beats)

    clock = Clock(meanwhile)
    with pytest.raises(LeaseError, match="elsewhere"):
        _contender(storage, clock).__enter__()
    assert 20 <= clock.slept <= 23


@pytest.mark.parametrize("boot_seconds", [1e9, 0.0, -1e9, float("nan"), 10**400, None, "x"])
def test_what_another_machines_clock_showed_decides_nothing(disk: Storage, boot_seconds: object) -> None:
    _elsewhere(disk, heartbeat_boot_seconds=boot_seconds, heartbeat_unix_seconds=time.time() + 3600)
    with _contender(disk, Clock()) as lease:
        assert lease.token == 2


def test_a_contender_that_is_paused_while_it_watches_looks_again(disk: Storage) -> None:
    """The pause is longer than the time to live: the holder wrote its heartbeat, and the contender did not see it."""
    _elsewhere(disk)

    def meanwhile() -> None:
        _rewrite(disk, 1, heartbeats=1)
        clock.now += 600

    clock = Clock(meanwhile)
    with pytest.raises(LeaseError, match="elsewhere"):
        _contender(disk, clock).__enter__()


def test_a_lease_that_is_released_while_it_is_watched_is_taken_at_once(storage: Storage) -> None:
    _elsewhere(storage)
    clock = Clock(lambda: _rewrite(storage, 1, released=True))
    with _contender(storage, clock) as lease:
        assert lease.token == 2
    assert clock.slept < 6


@pytest.mark.parametrize("step_seconds", [3600.0, -3600.0])
def test_a_step_of_the_wall_clock_takes_no_run_from_a_living_holder(
    disk: Storage, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    with Lease(disk) as lease:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + step_seconds)
        with pytest.raises(LeaseError):
            Lease(disk, sleep=lambda _: pytest.fail("a living holder of this machine is refused at once")).__enter__()
        lease.check()


def test_a_stopped_holder_of_this_machine_loses_the_run_after_its_time_to_live(disk: Storage) -> None:
    """Its process lives, and writes no heartbeat: stopped by a signal, or hung."""
    clock = Clock()
    stopped = Lease(disk, ttl_seconds=60, clock=clock)
    with stopped:
        clock.now += 59
        with pytest.raises(LeaseError):
            _contender(disk, clock).__enter__()
        assert clock.slept == 0
        clock.now += 2
        with _contender(disk, clock) as lease:
            assert lease.token == 2
            assert clock.slept >= 60, "it may have been suspended with its machine, and is about to go on"
            with pytest.raises(LeaseError, match="lost the run"):
                stopped.check()


def test_a_holder_that_was_suspended_with_its_machine_keeps_the_run(disk: Storage) -> None:
    clock = Clock()
    with Lease(disk, ttl_seconds=60, clock=clock) as suspended:
        clock.now += 7200
        contender = _contender(disk, clock)
        clock._meanwhile = lambda: suspended._refresh(released=False)
        with pytest.raises(LeaseError, match="is held by"):
            contender.__enter__()
        suspended.check()


def test_a_pid_that_was_used_again_holds_nothing(disk: Storage) -> None:
    me = Process.current()
    same = {"host": me.host, "boot": me.boot, "pid": me.pid, "started": me.started}
    assert not is_free({"released": False, "process": same})
    assert is_free({"process": {**same, "started": "1"}})
    assert is_free({"process": {**same, "pid": 2**22 + 1}})
    assert not is_free({"process": {**same, "pid": 2**22 + 1, "boot": "other"}})
    assert is_free({"released": True, "process": same})
    disk.write("lease-000001.json", b"{}")
    clock = Clock()
    with _contender(disk, clock) as lease:  # a record that names no time to live blocks nobody
        assert lease.token == 2
    assert clock.slept < 1


def test_the_heartbeat_goes_on_and_finds_a_successor(storage: Storage) -> None:
    with Lease(storage, ttl_seconds=0.3) as lease:
        before = storage.read_bytes("lease-000001.json")
        deadline = time.monotonic() + 10
        while storage.read_bytes("lease-000001.json") == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lease.check()
        storage.create("lease-000002.json", b"{}")
        while not lease.lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(LeaseError, match="lost the run"):
            lease.check()
    assert storage.list_files() == ["lease-000001.json", "lease-000002.json"], "what a successor holds is left alone"


class Pauses(threading.Event):
    """An event that records how long it is waited for, and is set after some pauses."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._count = count

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return len(self.seconds) > self._count


def test_a_heartbeat_that_fails_costs_nothing_if_the_next_one_is_written(
    disk: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pauses, with a beat after each, are shorter than the time to live by a third of it, to write them."""
    with Lease(disk, ttl_seconds=60) as lease:
        lease._stop.set()
        assert lease._thread
        lease._thread.join()
        lease._stop = pauses = Pauses(2)
        beats = []
        monkeypatch.setattr(lease, "_refresh", lambda released: beats.append(released))
        lease._keep()
        assert beats == [False, False]
        assert sum(pauses.seconds[:2]) <= 60 * 2 / 3
        monkeypatch.undo()


def test_check_reads_the_lease_each_time(storage: Storage) -> None:
    with Lease(storage, ttl_seconds=300) as lease:
        lease.check()
        storage.create("lease-000002.json", b"{}")
        with pytest.raises(LeaseError, match="lost the run"):
            lease.check()


def test_a_driver_whose_number_another_one_has_after_the_files_were_deleted_by_hand_lost_the_run(disk: Storage) -> None:
    with Lease(disk, ttl_seconds=300) as first:
        disk.delete("lease-000001.json")
        with Lease(disk, ttl_seconds=300) as second:
            assert second.token == first.token == 1
            first._refresh(released=False)
            second.check()
            with pytest.raises(LeaseError, match="lost the run"):
                first.check()
    assert json.loads(disk.read_bytes("lease-000001.json"))["nonce"] == second._record["nonce"]


def test_a_directory_that_is_gone_is_no_other_driver(tmp_path: Path) -> None:
    """An unmounted disk leaves an empty directory, in which everything else could be written."""
    place = tmp_path / "run"
    with Lease(Storage(place), ttl_seconds=300) as lease:
        lease.check()
        place.rename(tmp_path / "unmounted")
        place.mkdir()
        with pytest.raises(ArtifactError, match="is gone, or was emptied"):
            lease.check()
        place.rmdir()
        (tmp_path / "unmounted").rename(place)
        with pytest.raises(LeaseError, match="lost the run"):  # what was written meanwhile is unknown
            lease.check()


def test_check_does_not_pass_while_the_storage_cannot_be_asked(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(disk, ttl_seconds=300) as lease:

        def fails(*_, **__):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "walk", fails)
            with pytest.raises(ArtifactError):
                lease.check()
            assert not lease.lost
        lease.check()


def test_a_number_that_was_used_and_removed_is_not_taken_again(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(disk):
        pass
    late = Lease(disk)
    highest = Lease._highest
    calls = []

    def paused_after_looking(self: Lease) -> int:
        number = highest(self)
        calls.append(number)
        if len(calls) == 1:  # in the pause, others take 2 and 3; the last one removes the older files
            monkeypatch.setattr(Lease, "_highest", highest)
            for _ in range(2):
                with Lease(disk):
                    pass
        return number

    monkeypatch.setattr(Lease, "_highest", paused_after_looking)
    with late:
        assert late.token == 4
    assert disk.list_files() == ["lease-000004.json"]


def test_a_forked_child_neither_refreshes_nor_releases(disk: Storage) -> None:
    with Lease(disk, ttl_seconds=600) as lease:
        before = disk.read_bytes("lease-000001.json")
        pid = os.fork()
        if pid == 0:
            lease._refresh(released=True)
            lease.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert disk.read_bytes("lease-000001.json") == before
        with pytest.raises(LeaseError):
            Lease(disk).__enter__()


def test_a_damaged_lease_file_blocks_nobody(disk: Storage) -> None:
    disk.write("lease-000005.json", b"\xff{")
    with Lease(disk) as lease:
        assert lease.token == 6
