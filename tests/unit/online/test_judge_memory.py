"""The judges' memory: several writers, threads, crashes at every byte, and a bucket."""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ray.artifacts.journal import Journal, whole_lines
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError
from dpo_ray.online.judges.memory import JournalMemory, Section

LINES = [b'{"a": 1}', b"", '{"b": "\N{SNOWMAN}"}'.encode(), b"x" * 300]


def test_a_file_cut_at_any_byte_holds_all_whole_lines_and_takes_more(tmp_path: Path) -> None:
    path = tmp_path / "below" / "one.jsonl"
    journal = Journal(path)
    journal.append(LINES[:2])
    journal.append(LINES[2:])
    journal.close()
    data = path.read_bytes()
    assert data == b"".join(line + b"\n" for line in LINES)
    ends = [sum(len(line) + 1 for line in LINES[:count]) for count in range(len(LINES) + 1)]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends[1:])
        assert whole_lines(path.read_bytes()) == LINES[:whole]
        journal = Journal(path)
        journal.append([b"more"])
        journal.close()
        assert whole_lines(path.read_bytes()) == [*LINES[:whole], b"more"]


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "one")
    journal.append([b"first"])
    write, left = os.write, [3]

    def full(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ArtifactError, match="No space left") as caught:
        journal.append([b"second"])
    assert "one" in caught.value.where
    assert whole_lines((tmp_path / "one").read_bytes()) == [b"first"]
    monkeypatch.undo()
    journal.append([b"third"])
    assert (tmp_path / "one").read_bytes() == b"first\nthird\n"


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    if request.param == "disk":
        yield Storage(tmp_path / "memory")
        return
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="judgements")
    yield Storage(f"s3://judgements/{secrets.token_hex(4)}")
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_writers_share_what_they_know_when_they_open(place: Storage) -> None:
    one, two = (JournalMemory(place, "d1", name) for name in ("one", "two"))
    one.put("k1", {"scores": [1.5, None]})
    two.put_all({"k2": "text", "k3": 0})
    assert (one.get("k1"), one.get("k2")) == ({"scores": [1.5, None]}, None)
    three = JournalMemory(place, "d1", "three")
    assert [three.get(k) for k in ("k1", "k2", "k3", "k4")] == [{"scores": [1.5, None]}, "text", 0, None]
    assert len(JournalMemory(place, "d2", "one")) == 0  # of another judge
    again = JournalMemory(place, "d1", "one")  # the same name again, after a restart
    again.put("k4", True)
    assert len(JournalMemory(place, "d1", "two")) == 4


def test_the_first_answer_counts_and_is_written_once(place: Storage) -> None:
    memory = JournalMemory(place, "d", "one")
    memory.put("k", "first")
    memory.put("k", "second")
    assert memory.get("k") == "first"
    assert JournalMemory(place, "d", "two").get("k") == "first"
    assert sum(len(whole_lines(place.read_bytes(name))) for name in place.list_files()) == 1


def test_of_two_writers_the_one_that_wrote_first_counts(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ask the same question at the same time; the names of their files, and their order, have no part in it."""
    writers = {name: JournalMemory(place, "d", name) for name in ("a", "b", "c")}
    for seconds, name in enumerate("bca", 1_000_000):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: seconds)
        writers[name].put_all({"k": name, f"of {name}": name})
    again = JournalMemory(place, "d", "d")
    assert [again.get(key) for key in ("k", "of a", "of b", "of c")] == ["b", "a", "b", "c"]


def test_of_lines_with_one_time_or_none_the_first_counts(tmp_path: Path) -> None:
    """Lines without a time are those of an older version, and count as older."""
    lines = [{"key": "k", "answer": 1, "unix_seconds": 5.0}, {"key": "k", "answer": 2, "unix_seconds": 5.0}]
    lines += [
        {"key": "old", "answer": 3, "unix_seconds": 5.0},
        {"key": "old", "answer": 4},
        {"key": "old", "answer": 5},
    ]
    place = Storage(tmp_path)
    place.child("d").write("a.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    memory = JournalMemory(place, "d", "one")
    assert (memory.get("k"), memory.get("old")) == (1, 4)


def test_threads_lose_nothing_and_share_writes(place: Storage) -> None:
    memory = JournalMemory(place, "d", "one")
    together = threading.Barrier(8)

    def put(thread: int) -> None:
        together.wait()
        for i in range(10):
            memory.put(f"{thread}-{i}", i)
            assert memory.get(f"{thread}-{i}") == i

    threads = [threading.Thread(target=put, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = JournalMemory(place, "d", "two")
    assert len(found) == 80
    assert all(found.get(f"{t}-{i}") == i for t in range(8) for i in range(10))
    if not place.is_local:
        assert len(place.list_files()) < 80


def test_a_damaged_line_costs_its_own_answer_alone(tmp_path: Path) -> None:
    memory = JournalMemory(Storage(tmp_path), "d", "one")
    memory.put_all({"a": 1, "b": 2, "c": 3})
    path = tmp_path / "d" / "one.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], bytes(len(lines[1])), lines[2], b'["no entry"]', b'{"key": "d", "ans']))
    again = JournalMemory(Storage(tmp_path), "d", "one")
    assert [again.get(k) for k in "abcd"] == [1, None, 3, None]
    again.put("b", 2)
    assert [JournalMemory(Storage(tmp_path), "d", "x").get(k) for k in "abc"] == [1, 2, 3]


def test_what_could_not_be_written_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = JournalMemory(Storage(tmp_path), "d", "one")
    memory.put("a", 1)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match="cannot append"):
        memory.put("b", 2)
    assert memory.get("b") is None
    monkeypatch.undo()
    memory.put("b", 2)
    data = (tmp_path / "d" / "one.jsonl").read_bytes()
    entries = [json.loads(line) for line in whole_lines(data)]
    assert [(entry["key"], entry["answer"]) for entry in entries] == [("a", 1), ("b", 2)]


def test_sections_do_not_meet(tmp_path: Path) -> None:
    memory = JournalMemory(Storage(tmp_path), "d", "one")
    one, two = Section(memory, "one"), Section(memory, "two")
    one.put("k", 1)
    two.put_all({"k": 2})
    assert (one.get("k"), two.get("k"), memory.get("k")) == (1, 2, None)
