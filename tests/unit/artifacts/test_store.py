from __future__ import annotations

import os
import random
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.disk import Disk
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.errors import ArtifactError
from tests.unit.artifacts.conftest import FILES, commit, sent, write_all


def test_commit_makes_an_artifact_that_verifies_and_reads_back(storage: Storage, tmp_path: Path) -> None:
    store = ArtifactStore(storage)
    assert store.find("tokens", "k1") is None
    staging = sent(store.begin("tokens", "k1", "run"))
    entries = write_all(staging, FILES)
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    entries.append(staging.upload("big.bin", tmp_path / "big", rows=7))
    assert store.find("tokens", "k1") is None, "nothing is visible before the commit"
    made = commit(staging, entries)
    artifact = ArtifactStore(storage).find("tokens", "k1")
    assert artifact == made
    artifact = sent(artifact)
    artifact.verify()
    assert {name: artifact.read_bytes(name) for name in FILES} == FILES
    assert artifact.entry("big.bin").rows == 7
    assert artifact.names("model") == ["model/weights.safetensors"]
    with artifact.open("big.bin") as file:
        file.seek(99_990)
        assert file.read() == b"x" * 10
    assert (artifact.key, artifact.stage, artifact.manifest.run) == ("k1", "tokens", "run")
    assert not storage.list_files(".staging"), "no marker and no staging place is left"


def test_local_dir_holds_the_files_and_refuses_a_damaged_one(storage: Storage, tmp_path: Path) -> None:
    staging = ArtifactStore(storage).begin("policy", "k1", "run")
    artifact = commit(staging, write_all(staging, FILES))
    for _ in range(2):
        folder = artifact.local_dir("model", tmp_path / "cache")
        assert (folder / "weights.safetensors").read_bytes() == FILES["model/weights.safetensors"]
    with pytest.raises(ArtifactError, match="no files below"):
        artifact.local_dir("absent", tmp_path / "cache")
    artifact.storage.write(artifact.entry("model/weights.safetensors").path, b"short")
    with pytest.raises(ArtifactError, match="weights"):
        artifact.local_dir("model", tmp_path / "other_cache")
    assert not [path for path in (tmp_path / "other_cache").rglob("*") if path.is_file()]


def test_the_second_commit_of_a_key_returns_the_first_artifact(storage: Storage) -> None:
    store = ArtifactStore(storage)
    first, second = store.begin("tokens", "k1", "a"), store.begin("tokens", "k1", "b")
    ours, theirs = write_all(first, {"f": b"1"}), write_all(second, {"f": b"2"})
    made = commit(first, ours)
    assert commit(second, theirs) == made
    made.verify()
    assert storage.list_files() == sorted([f"tokens-k1/{made.entry('f').path}", "tokens-k1/manifest.json"])


def test_a_commit_that_loses_at_the_last_moment_returns_the_winner(storage: Storage, monkeypatch) -> None:
    store = ArtifactStore(storage)
    first, second = store.begin("tokens", "k1", "a"), store.begin("tokens", "k1", "b")
    entries = write_all(first, {"f": b"1"})
    late = write_all(second, {"f": b"2"})
    made = []
    checked = type(second)._checked

    def meanwhile(self, files):
        if self.run == "b":
            made.append(commit(first, entries))
        return checked(self, files)

    monkeypatch.setattr(type(second), "_checked", meanwhile)
    assert commit(second, late) == made[0]
    made[0].verify()
    assert len(storage.list_files()) == 2


def _commit_in_process(root: str, run: str, barrier, results) -> None:
    staging = ArtifactStore(Storage(root)).begin("tokens", "same", run)
    entries = [staging.write("f", run.encode())]
    barrier.wait()
    artifact = commit(staging, entries)
    results.put((run, artifact.manifest.attempt, artifact.read_bytes("f")))


@pytest.mark.parametrize("storage", ["disk"], indirect=True)
def test_two_processes_commit_the_same_key_and_get_the_same_artifact(storage: Storage) -> None:
    context = get_context("fork")
    for _ in range(5):
        barrier, results = context.Barrier(2), context.Queue()
        arguments = [(storage.uri, run, barrier, results) for run in ("one", "two")]
        workers = [context.Process(target=_commit_in_process, args=values) for values in arguments]
        for worker in workers:
            worker.start()
        got = [results.get(timeout=20) for _ in workers]
        for worker in workers:
            worker.join(20)
            assert worker.exitcode == 0
        assert len({(attempt, data) for _, attempt, data in got}) == 1
        artifact = ArtifactStore(storage).find("tokens", "same")
        assert artifact is not None
        artifact.verify()
        assert not storage.list_files(".staging")
        storage.delete_tree("tokens-same")


def test_commit_refuses_what_was_not_written_as_listed(storage: Storage) -> None:
    staging = ArtifactStore(storage).begin("tokens", "k1", "run")
    entry = staging.write("f", b"12345")
    cases = {
        "missing": [entry, FileEntry(name="absent", path="absent", bytes=1, sha256="0" * 64)],
        "twice": [entry, entry],
        "5 bytes, but": [entry.model_copy(update={"bytes": 6})],
        "but the file belongs at": [entry.model_copy(update={"path": "elsewhere/f"})],
        "reserved": [entry, FileEntry(name="manifest.json", path="manifest.json", bytes=1, sha256="0" * 64)],
    }
    for message, entries in cases.items():
        with pytest.raises(ArtifactError, match=message):
            commit(staging, entries)
    with pytest.raises(ArtifactError, match="JSON cannot represent"):
        commit(staging, [entry], figures={"margin": float("nan")})
    commit(staging, [entry]).verify()


def test_files_that_the_commit_does_not_list_are_not_in_the_artifact(storage: Storage) -> None:
    staging = ArtifactStore(storage).begin("tokens", "k1", "run")
    entry = staging.write("part-0", b"data")
    staging.write("part-0-of-a-repeated-task", b"data")
    artifact = commit(staging, [entry])
    artifact.verify()
    assert artifact.names() == ["part-0"]


def test_abandon_leaves_nothing(storage: Storage) -> None:
    staging = ArtifactStore(storage).begin("tokens", "k1", "run")
    staging.write("f", b"data")
    staging.abandon()
    staging.abandon()
    assert storage.list_files() == []


def test_sweep_removes_dead_attempts_of_this_run_only(storage: Storage) -> None:
    store = ArtifactStore(storage)
    mine = store.begin("tokens", "k1", "run")
    mine.write("f", b"mine")
    pid = os.fork()
    if pid == 0:  # a driver that dies in the middle; on S3 its client belongs to the parent, so disk only writes
        code = 0
        if storage.is_local:
            dead = store.begin("tokens", "k2", "run")
            dead.write("f", b"dead")
            store.begin("reference-scores", "k3", "run").write("a/b", b"dead")
            store.begin("tokens", "k4", "other").write("f", b"of another run")
        os._exit(code)
    os.waitpid(pid, 0)
    if not storage.is_local:
        for stage, key, run in (
            ("tokens", "k2", "run"),
            ("reference-scores", "k3", "run"),
            ("tokens", "k4", "other"),
        ):
            left = store.begin(stage, key, run)
            left.write("f", b"dead")
            marker = f".staging/{run}/{stage}-{key}.{left.attempt}.json"
            storage.write(marker, b'{"host": "elsewhere", "boot": "x", "pid": 1, "started": "2"}')
    assert store.sweep("run") == 2
    assert store.sweep("run") == 0
    left = [name for name in storage.list_files() if not name.endswith(".json")]
    assert len(left) == 2
    assert any("k4" in name for name in left)
    commit(mine, [mine.write("g", b"still writable")]).verify()


def test_an_attempt_that_was_swept_cannot_commit(storage: Storage) -> None:
    store = ArtifactStore(storage)
    staging = store.begin("tokens", "k1", "run")
    entry = staging.write("f", b"data")
    marker = next(name for name in storage.list_files(".staging") if name.endswith(".json"))
    storage.delete(marker)  # as a later driver does first
    if storage.is_local:
        storage.delete_tree(".staging/run")
    with pytest.raises(ArtifactError):
        commit(staging, [entry])
    assert store.find("tokens", "k1") is None
    assert store.sweep("run") == 0


def test_latest_is_the_newest_manifest_of_that_stage_and_run(storage: Storage) -> None:
    store = ArtifactStore(storage)
    for stage, key, run in [
        ("tokens", "a", "r"),
        ("tokens", "b", "r"),
        ("tokens", "c", "q"),
        ("tokens-x", "d", "r"),
    ]:
        staging = store.begin(stage, key, run)
        commit(staging, [staging.write("f", key.encode())])
        time.sleep(0.002)
    newest = store.latest("tokens", "r")
    assert newest is not None
    assert newest.key == "b"
    assert store.latest("tokens", "nobody") is None


def test_verify_finds_flipped_bits_truncations_missing_and_extra_files(disk: Storage) -> None:
    staging = ArtifactStore(disk).begin("tokens", "k1", "run")
    artifact = commit(staging, write_all(staging, FILES))
    home = artifact.storage.local_path()
    artifact.verify()
    names = ["part-0.parquet", "model/weights.safetensors", "manifest.json"]
    random_source, found = random.Random(7), 0
    for _ in range(400):
        path = home / random_source.choice(names)
        before = path.read_bytes()
        kind = random_source.choice(["flip", "flip", "truncate", "remove", "extra", "grow"])
        if kind == "flip":
            bit = random_source.randrange(len(before) * 8)
            damaged = bytearray(before)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
        elif kind == "truncate":
            path.write_bytes(before[: random_source.randrange(len(before))])
        elif kind == "grow":
            path.write_bytes(before + b"\0")
        elif kind == "remove":
            path.unlink()
        else:
            (path.parent / "extra").write_bytes(b"")
        with pytest.raises(ArtifactError) as caught:
            artifact.verify()
        assert str(home) in str(caught.value)
        assert "delete the artifact's directory" in caught.value.fix
        found += 1
        path.write_bytes(before)
        (path.parent / "extra").unlink(missing_ok=True)
    assert found == 400
    artifact.verify()


def test_an_artifact_whose_disk_is_gone_is_not_called_damaged(disk: Storage) -> None:
    """Who unmounts a disk by mistake must not be told to delete what is on it."""
    staging = ArtifactStore(disk).begin("tokens", "k1", "run")
    artifact = commit(staging, write_all(staging, FILES))
    (artifact.storage.local_path() / "part-0.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"'part-0.parquet' is missing") as damaged:
        artifact.open("part-0.parquet")
    assert "delete the artifact's directory" in damaged.value.fix
    shutil.rmtree(artifact.storage.local_path())
    for read in (artifact.open, artifact.read_bytes, lambda name: artifact.local_dir("", disk.local_path("cache"))):
        with pytest.raises(ArtifactError, match="the whole artifact is gone") as gone:
            read("part-0.parquet")
        assert "mount it again" in gone.value.fix
        assert "delete" not in gone.value.fix


def test_a_disk_that_goes_between_two_checks_is_no_other_error(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = ArtifactStore(disk).begin("tokens", "k1", "run")
    artifact = commit(staging, write_all(staging, FILES))
    check_size = Artifact._check_size

    def then_unmount(self: Artifact, entry: FileEntry, size: int | None = None) -> None:
        check_size(self, entry, size)
        shutil.rmtree(artifact.storage.local_path(), ignore_errors=True)

    monkeypatch.setattr(Artifact, "_check_size", then_unmount)
    with pytest.raises(ArtifactError, match="the whole artifact is gone"):
        artifact.open("part-0.parquet")


def test_shallow_verify_looks_at_sizes_alone(disk: Storage) -> None:
    staging = ArtifactStore(disk).begin("tokens", "k1", "run")
    artifact = commit(staging, [staging.write("f", b"abc")])
    artifact.storage.write("f", b"abd")
    artifact.verify(deep=False)
    with pytest.raises(ArtifactError, match="sha256"):
        artifact.verify()
    artifact.storage.write("f", b"abcd")
    with pytest.raises(ArtifactError, match="4 bytes"):
        artifact.verify(deep=False)


def test_a_damaged_manifest_means_not_committed_and_is_set_aside(disk: Storage) -> None:
    store = ArtifactStore(disk)
    staging = store.begin("tokens", "k1", "run")
    commit(staging, [staging.write("f", b"old")])
    disk.write("tokens-k1/manifest.json", b"{ half")
    assert store.find("tokens", "k1") is None
    again = store.begin("tokens", "k1", "run")
    artifact = commit(again, [again.write("f", b"new")])
    artifact.verify()
    assert artifact.read_bytes("f") == b"new"
    assert disk.read_bytes(f"tokens-k1.damaged-{again.attempt}/f") == b"old"


def test_a_damaged_manifest_on_an_object_store_is_an_error_before_the_work(s3: Storage) -> None:
    s3.write("tokens-k1/manifest.json", b"{ half")
    with pytest.raises(ArtifactError, match="delete the artifact's directory"):
        ArtifactStore(s3).find("tokens", "k1")


def test_a_manifest_of_a_newer_format_is_refused_by_name(disk: Storage) -> None:
    disk.write("tokens-k1/manifest.json", b'{"format": 2}')
    with pytest.raises(ArtifactError, match="upgrade"):
        ArtifactStore(disk).find("tokens", "k1")


def test_an_artifact_below_another_name_is_refused(disk: Storage) -> None:
    staging = ArtifactStore(disk).begin("tokens", "k1", "run")
    commit(staging, [staging.write("f", b"data")])
    os.symlink(disk.local_path("tokens-k1"), disk.local_path() / "tokens-k2")
    with pytest.raises(ArtifactError, match="belongs to tokens-k1"):
        ArtifactStore(disk).find("tokens", "k2")


def test_links_in_an_artifact_are_refused(disk: Storage, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"data")
    staging = ArtifactStore(disk).begin("tokens", "k1", "run")
    artifact = commit(staging, [staging.write("f", b"data")])
    artifact.storage.local_path("f").unlink()
    (artifact.storage.local_path() / "f").symlink_to(secret)
    for act in (artifact.verify, lambda: artifact.open("f"), lambda: artifact.read_bytes("f")):
        with pytest.raises(ArtifactError, match="symbolic link"):
            act()
    (Disk(artifact.storage.local_path()).root / "f").unlink()
    (artifact.storage.local_path() / "dir").symlink_to(tmp_path)
    artifact.storage.write("f", b"data")
    with pytest.raises(ArtifactError, match="not in the manifest"):
        artifact.verify()


def test_a_manifest_in_another_spelling_is_not_the_one_we_wrote(disk: Storage) -> None:
    staging = ArtifactStore(disk).begin("tokens", "k1", "run")
    artifact = commit(staging, [staging.write("f", b"data")])
    written = artifact.storage.read_bytes("manifest.json")
    for respelled in (
        written.replace(b": ", b":  ", 1),
        written + b"\n",
        written.replace(b'"k1"', b'"\\u006b1"'),
    ):
        artifact.storage.write("manifest.json", respelled)
        with pytest.raises(ArtifactError, match="digest"):
            artifact.verify()
