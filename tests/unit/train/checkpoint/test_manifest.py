"""A manifest commits what was written before it, and pruning deletes only what no checkpoint and no attempt needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from dpo_ray.train.checkpoint.claim import Claim
from dpo_ray.train.checkpoint.manifest import commit, committed_steps, prune
from tests.unit.train.checkpoint.test_checkpoint import advance, make


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "checkpoints")


def test_a_step_whose_metrics_cannot_be_written_is_not_committed(
    disk: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a death between the two would lose the metrics for good, as the steps are not run again."""
    checkpoints, (policy, optimizer) = Checkpoints(disk, "a-1", 2), make()
    advance(policy, optimizer, 0)
    write = Storage.write

    def full(self: Storage, name: str, data: bytes, rows: int | None = None) -> FileEntry:
        if name.startswith("metrics/"):
            raise ArtifactError("no space left on the device")
        return write(self, name, data, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", full)
        checkpoints.save(policy, optimizer, Progress(1), [{"step": 1, "loss": 0.5}])
        with pytest.raises(ArtifactError, match="no space left"):
            checkpoints.finish()
    assert committed_steps(disk) == []
    again = Checkpoints(disk, "a-2", 2)
    assert again.load_newest(policy, optimizer) == Progress()
    advance(policy, optimizer, 0)
    again.save(policy, optimizer, Progress(1), [{"step": 1, "loss": 0.25}])
    again.finish()
    assert again.metrics(1) == [{"step": 1, "loss": 0.25}]


def committed(place: Storage, step: int, attempt: str = "a-1", best: int | None = None) -> None:
    """Commit a checkpoint of one small file."""
    directory = f"step-{step:09d}/{attempt}"
    place.child(directory).write("rng.json", b"[]")
    best_facts = None if best is None else {"step": best, "value": 0.5, "since": 0}
    commit(place, directory, {"step": step, "best": best_facts}, {})


def directories(place: Storage) -> list[str]:
    return [name for name in place.list_dirs() if name.startswith("step-")]


def test_what_is_newer_than_the_newest_checkpoint_is_left_to_the_attempt_that_writes_it(disk: Storage) -> None:
    claim = Claim(disk, "this")
    for step in (2, 4, 6):
        committed(disk, step)
    for step in (3, 5, 9):  # no manifest: 3 and 5 were left by attempts that died, 9 may be in the writing
        disk.child(f"step-{step:09d}", "other").write("__0_0.distcp", b"half")
    prune(disk, 2, claim)
    assert committed_steps(disk) == [4, 6]
    assert directories(disk) == [f"step-{step:09d}" for step in (4, 5, 6, 9)]
    prune(disk, 1, claim)
    assert committed_steps(disk) == [6]
    assert directories(disk) == ["step-000000006", "step-000000009"]


def test_the_best_of_each_kept_checkpoint_is_kept_and_other_files_are_not_touched(disk: Storage) -> None:
    claim = Claim(disk, "this")
    for step, best in ((1, 1), (2, 2), (3, 1), (4, 2)):
        committed(disk, step, best=best)
    disk.child("notes").write("README.txt", b"mine")
    disk.write("step-000000001.txt", b"mine")
    prune(disk, 2, claim)
    assert committed_steps(disk) == [1, 2, 3, 4]
    prune(disk, 1, claim)
    assert committed_steps(disk) == [2, 4]
    assert directories(disk) == ["step-000000002", "step-000000004"]
    assert disk.read_bytes("notes/README.txt") == disk.read_bytes("step-000000001.txt") == b"mine"


def test_a_manifest_lists_the_digest_of_every_file(disk: Storage) -> None:
    """Those of other ranks as they were reported, also where this rank does not see the file."""
    files = disk.child("step-000000007/a-1")
    files.write("rng.json", b"[]")
    files.write("__0_0.distcp", b"seen")
    commit(disk, "step-000000007/a-1", {"step": 7}, {"__1_0.distcp": "of rank 1", "__0_0.distcp": "of rank 0"})
    manifest = json.loads(disk.read_bytes("step-000000007.json"))
    assert manifest["files"] == {
        "__0_0.distcp": "of rank 0",
        "__1_0.distcp": "of rank 1",
        "rng.json": "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",  # sha256sum of `[]`
    }
