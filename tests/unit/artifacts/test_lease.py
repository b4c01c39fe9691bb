from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from multiprocessing import get_context

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
        assert "60 s" in caught.value.fix
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


def _elsewhere(storage: Storage, **changes: object) -> None:
    """Leave the lease of a process of another machine."""
    with Lease(storage, holder="user@elsewhere pid 1"):
        process = {"host": "elsewhere", "boot": "b", "pid": 1, "started": "1"}
        record = json.loads(storage.read_bytes("lease-000001.json")) | {"process": process} | changes
    storage.write("lease-000001.json", json.dumps(record).encode())


def test_the_lease_of_another_machine_is_free_when_its_heartbeat_is_old(storage: Storage) -> None:
    _elsewhere(storage)
    with pytest.raises(LeaseError, match="elsewhere"):
        Lease(storage).__enter__()
    _rewrite(storage, 1, heartbeat_unix_seconds=time.time() - 62)
    with pytest.raises(LeaseError, match="elsewhere"):  # within the difference of clocks
        Lease(storage).__enter__()
    _rewrite(storage, 1, heartbeat_unix_seconds=time.time() - 70)
    with Lease(storage) as lease:
        assert lease.token == 2


def test_a_pid_that_was_used_again_holds_nothing(disk: Storage) -> None:
    me = Process.current()
    record = {"released": False, "heartbeat_unix_seconds": time.time(), "ttl_seconds": 60.0}
    same = {"host": me.host, "boot": me.boot, "pid": me.pid, "started": me.started}
    assert not is_free({**record, "process": same}, time.time())
    assert is_free({**record, "process": {**same, "started": "1"}}, time.time())
    assert is_free({**record, "process": {**same, "pid": 2**22 + 1}}, time.time())
    assert not is_free({**record, "process": {**same, "pid": 2**22 + 1, "boot": "other"}}, time.time())
    assert is_free({**record, "released": True, "process": same}, time.time())
    assert is_free({}, time.time())


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


def test_check_asks_the_storage_after_a_pause(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(disk, ttl_seconds=300) as lease:
        disk.create("lease-000002.json", b"{}")
        lease.check()  # the last heartbeat is young
        later = time.time() + 400
        monkeypatch.setattr(time, "time", lambda: later)
        with pytest.raises(LeaseError):
            lease.check()


def test_check_does_not_pass_while_the_storage_cannot_be_asked(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(disk, ttl_seconds=300) as lease:
        later = time.time() + 400

        def fails(*_, **__):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: later)
            patch.setattr(os, "fsync", fails)
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
