"""Each file of a checkpoint is hashed by the rank that wrote it, and verified by one rank of all; the verdict is of all."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import WriteRefusedError
from dpo_ray.train.checkpoint import checkpoint, verify
from dpo_ray.train.checkpoint.checkpoint import Best, Checkpoints, Progress
from dpo_ray.train.checkpoint.manifest import committed_steps
from tests.helpers.processes.checkpoint import rank_of_two
from tests.helpers.ranks import run_ranks
from tests.unit.train.checkpoint.test_checkpoint import advance, make, run, same, state_of

FILES = {".metadata", "__0_0.distcp", "__1_0.distcp", "rng-0.json", "rng-1.json"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two-ranks")
    run_ranks(rank_of_two, 2, place)
    return place


@pytest.fixture(scope="module")
def found(two_ranks: Path) -> list[dict[str, Any]]:
    return [json.loads((two_ranks / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "checkpoints")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_manifest_s_digests_are_those_of_the_files(two_ranks: Path) -> None:
    root = two_ranks / "checkpoints"
    manifest = json.loads((root / "step-000000001.json").read_text())
    files = {file.name: sha256(file) for file in (root / manifest["directory"]).iterdir()}
    assert manifest["files"] == files
    assert set(files) == FILES


def test_all_of_a_checkpoint_is_the_users_alone(two_ranks: Path) -> None:
    modes = {(path.is_dir(), oct(path.stat().st_mode & 0o7777)) for path in (two_ranks / "checkpoints").rglob("*")}
    assert modes == {(True, "0o700"), (False, "0o600")}


def test_each_rank_hashes_what_it_wrote(found: list[dict[str, Any]]) -> None:
    for step in (1, 2):
        first, second = (of_rank[f"saved {step}"] for of_rank in found)
        assert second == [f"step-{step:09d}/__1_0.distcp"]
        assert first == [f"step-{step:09d}/{name}" for name in (".metadata", "__0_0.distcp")]


def test_each_file_is_verified_by_one_rank_and_once(found: list[dict[str, Any]]) -> None:
    (step, first), (other_step, second) = (of_rank["restored"] for of_rank in found)
    assert step == other_step == 2
    assert sorted(first + second) == sorted(f"step-{s:09d}/{name}" for s in (1, 2) for name in FILES)
    assert len(first) - len(second) == 2, "of five files, one rank verifies three"
    assert all(of_rank["as it was"] for of_rank in found)


def test_each_rank_reads_the_state_of_its_own_random_generators_alone(found: list[dict[str, Any]]) -> None:
    assert [of_rank["generators"] for of_rank in found] == [["rng-0.json"], ["rng-1.json"]]


def test_the_verdict_is_of_all_ranks(two_ranks: Path, found: list[dict[str, Any]]) -> None:
    assert [of_rank["damaged"] for of_rank in found] == [1, 1]
    reason = two_ranks / "checkpoints/damaged/step-000000002.reason"
    assert reason.read_text() == "__1_0.distcp is not what was written"


def test_one_rank_that_cannot_read_sets_nothing_aside(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert "rank 1 cannot read a checkpoint file that rank 0 can read" in of_rank["one sees otherwise"]
        assert of_rank["and as it is"] == 2


def test_a_file_that_changes_between_its_digest_and_the_commit_is_found(
    disk: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.commit

    def changed_before(place: Storage, directory: str, facts: dict[str, Any], digests: dict[str, str]) -> None:
        if facts["step"] == 4:
            (file,) = place.child(directory).local_path().glob("*.distcp")
            file.write_bytes(file.read_bytes()[:-1] + b"x")
        real(place, directory, facts, digests)

    monkeypatch.setattr(checkpoint, "commit", changed_before)
    states = run(Checkpoints(disk, "a-1", 2), 0, [2, 4], *make())
    assert committed_steps(disk) == [2, 4]
    policy, optimizer = make(9)
    assert Checkpoints(disk, "a-2", 2).load_newest(policy, optimizer).step == 2
    assert same(state_of(policy, optimizer), states[2])
    assert disk.read_bytes("damaged/step-000000004.reason") == b"__0_0.distcp is not what was written"


def test_a_file_that_is_gone_before_the_commit_is_named_and_missed(
    disk: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a rank writes to a disk that the others do not see."""
    real = checkpoint.commit

    def gone_before(place: Storage, directory: str, facts: dict[str, Any], digests: dict[str, str]) -> None:
        if facts["step"] == 4:
            place.child(directory).delete("__0_0.distcp")
        real(place, directory, facts, digests)

    monkeypatch.setattr(checkpoint, "commit", gone_before)
    run(Checkpoints(disk, "a-1", 2), 0, [2, 4], *make())
    assert Checkpoints(disk, "a-2", 2).load_newest(*make(9)).step == 2
    assert disk.read_bytes("damaged/step-000000004.reason") == b"__0_0.distcp is not what was written"


@pytest.mark.parametrize("limit_bytes", [0, 600, 2000])  # the weights need more
def test_a_disk_that_refuses_to_write_is_told_from_other_faults(disk: Storage, limit_bytes: int) -> None:
    """The limit of a process for the size of files stands for a full disk: the kernel refuses in the same places."""
    policy, optimizer = make()
    advance(policy, optimizer, 0)
    checkpoints = Checkpoints(disk, "one", keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        checkpoints.save(policy, optimizer, Progress(1), [])
        with pytest.raises(WriteRefusedError, match="cannot write: File too large"):
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert committed_steps(disk) == []


def test_no_checkpoint_is_verified_twice_in_a_restore(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one is damaged, and all others refer to it."""
    checkpoints, (policy, optimizer) = Checkpoints(disk, "a-1", 3), make()
    for step in (1, 2, 3):
        advance(policy, optimizer, step)
        checkpoints.save(policy, optimizer, Progress(step, best=Best(1, 0.5)), [])
    checkpoints.finish()
    disk.child("step-000000001", "attempt-000001").write("rng-0.json", b"")
    real, hashed = verify.digest, []

    def noted(directory: Storage, name: str) -> str:
        hashed.append(directory.full_path(name))
        return real(directory, name)

    monkeypatch.setattr(verify, "digest", noted)
    assert Checkpoints(disk, "a-2", 3).load_newest(*make(9)) == Progress()
    # rank 0 looks once more at the file that is suspect
    assert sorted(hashed) == sorted([*set(hashed), disk.full_path("step-000000001/attempt-000001/rng-0.json")])
    assert len(set(hashed)) == 9
