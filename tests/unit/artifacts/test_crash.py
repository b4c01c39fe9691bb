from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray.artifacts import disk as disk_module
from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.errors import ArtifactError
from tests.unit.artifacts.conftest import FILES, commit, write_all
from tests.unit.artifacts.power import run_and_cut


def _make(root: Storage, upload: Path) -> None:
    staging = ArtifactStore(root).begin("tokens", "k1", "run")
    entries = [*write_all(staging, FILES), staging.upload("big", upload)]
    commit(staging, entries)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
def test_a_cut_before_every_operation_leaves_no_artifact_or_a_whole_one(tmp_path: Path, power: bool) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(70_000))
    ended, cut, seen = False, 0, set()
    while not ended:
        root = Storage(tmp_path / f"root-{cut}")
        root.local_path().mkdir()
        ended = run_and_cut(lambda root=root: _make(root, big), root.local_path(), cut, power)
        store = ArtifactStore(root)
        artifact = store.find("tokens", "k1")
        seen.add(artifact is not None)
        if artifact is not None:
            artifact.verify()
        if ended:
            assert artifact is not None, "a commit that returned survives a power cut"
        store.sweep("run")
        _make(root, big)
        artifact = store.find("tokens", "k1")
        assert artifact is not None
        artifact.verify()
        assert artifact.read_bytes("big") == big.read_bytes()
        assert {name: artifact.read_bytes(name) for name in FILES} == FILES
        assert store.sweep("run") == 0
        assert not root.list_files(".staging")
        cut += 1
    assert cut >= 30
    assert seen == {True, False}


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
def test_a_cut_in_a_replacement_leaves_the_old_file_or_the_new_one(tmp_path: Path, power: bool) -> None:
    old, new, ended, cut = b"old" * 1000, b"new" * 1500, False, 0
    while not ended:
        place = Storage(tmp_path / f"root-{cut}")
        place.write("a/state.json", old)
        root = place.local_path()
        ended = run_and_cut(lambda place=place: place.write("a/state.json", new), root, cut, power)
        assert place.read_bytes("a/state.json") in ((new,) if ended else (old, new))
        assert place.list_files() == ["a/state.json"]
        cut += 1
    assert cut >= 3


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
def test_a_cut_in_an_exclusive_creation_leaves_nothing_or_the_whole_file(tmp_path: Path, power: bool) -> None:
    data, ended, cut = b"data" * 1000, False, 0
    while not ended:
        place = Storage(tmp_path / f"root-{cut}")
        root = place.local_path()
        root.mkdir()
        ended = run_and_cut(lambda place=place: place.create("a/lease", data), root, cut, power)
        there = place.exists("a/lease")
        assert there or not ended
        if there:
            assert place.read_bytes("a/lease") == data
        else:
            place.create("a/lease", data)
        cut += 1
    assert cut >= 4


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
def test_a_cut_in_a_lease_leaves_a_run_that_can_be_taken(tmp_path: Path, power: bool) -> None:
    ended, cut = False, 0
    while not ended:
        place = Storage(tmp_path / f"root-{cut}")
        place.local_path().mkdir()
        with Lease(place, ttl_seconds=600) as first:
            pass

        def hold(place: Storage = place) -> None:
            with Lease(place, ttl_seconds=600):
                pass

        ended = run_and_cut(hold, place.local_path(), cut, power)
        with Lease(place, ttl_seconds=600) as lease:
            assert lease.token > first.token
        cut += 1
    assert cut >= 6


def _error_of(action: Callable[[], object]) -> ArtifactError | None:
    try:
        action()
    except ArtifactError as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_an_artifact_error_that_says_what_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 1000)
    calls = failures = 0

    def failing(function, at: int):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(code, os.strerror(code))
            return function(*arguments, **options)

        return call

    for at in range(1, 200):
        root, calls = Storage(tmp_path / f"root-{at}"), 0
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename", "mkdir"):
                patch.setattr(os, name, failing(getattr(os, name), at))
            error = _error_of(lambda root=root: _make(root, big))
        if error is not None:
            failures += 1
            assert os.strerror(code) in error.what
            assert str(root.uri) in error.where
            assert "run the same command again" in error.fix
        artifact = ArtifactStore(root).find("tokens", "k1")
        assert artifact is not None or error is not None
        _make(root, big)
        artifact = ArtifactStore(root).find("tokens", "k1")
        assert artifact is not None
        artifact.verify()
        if error is None:
            break
    assert failures >= 20
    assert at == failures + 1


def test_no_space_for_the_bytes_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Storage(tmp_path)
    place.write("f", b"old")

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            self.file.write(data[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "open", lambda *a, **o: Full(open(*a, **o)), raising=False)  # noqa: SIM115
        with pytest.raises(ArtifactError, match="No space left") as caught:
            place.write("f", b"new")
    assert "free space" in caught.value.fix
    assert caught.value.where == str(tmp_path / "f")
    assert place.read_bytes("f") == b"old"
    assert os.listdir(tmp_path) == ["f"], "the unfinished file gives its space back"


def test_the_kernels_own_refusal_of_a_large_file(tmp_path: Path) -> None:
    place, source = Storage(tmp_path / "root"), tmp_path / "source"
    place.write("f", b"old")
    source.write_bytes(b"x" * 50_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ArtifactError, match="File too large"):
            place.upload("f", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert place.read_bytes("f") == b"old"
    assert os.listdir(tmp_path / "root") == ["f"]
