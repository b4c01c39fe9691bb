"""Workers that were replaced may run on: what they write changes nothing that is read, and they commit nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import LeaseError
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from dpo_ray.train.checkpoint.claim import Claim
from dpo_ray.train.checkpoint.manifest import commit, committed_steps, prune
from tests.unit.train.checkpoint.test_checkpoint import advance, make, run, same, state_of


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "checkpoints")


def contents(place: Storage) -> dict[str, bytes]:
    return {name: place.read_bytes(name) for name in place.list_files()}


def test_a_late_write_of_replaced_workers_changes_nothing_that_is_read(disk: Storage) -> None:
    """They are of the same driver, on a node that was cut off: they reach the same step after their successors."""
    replaced, late = Checkpoints(disk, "a", 2), make()
    run(replaced, 0, [2], *late)
    newer, (policy, optimizer) = Checkpoints(disk, "a", 2), make(9)
    assert newer.load_newest(policy, optimizer).step == 2
    states = run(newer, 2, [4], policy, optimizer)
    before = contents(disk)
    for _ in range(3):
        advance(*late, step=5)  # so that its files differ
    replaced.save(*late, Progress(4), [{"step": 4.0, "loss": 7.0}])
    with pytest.raises(LeaseError, match="these workers were replaced"):
        replaced.finish()
    after = contents(disk)
    assert {name: after[name] for name in before} == before
    written = {Path(name).parent.as_posix() for name in after.keys() - before.keys()}
    assert written == {"step-000000004/attempt-000001"}
    fresh = make(8)
    assert Checkpoints(disk, "a", 2).load_newest(*fresh).step == 4
    assert same(state_of(*fresh), states[4])


def test_workers_whose_training_was_committed_and_its_checkpoints_deleted_commit_nothing(disk: Storage) -> None:
    replaced, late = Checkpoints(disk, "a", 2), make()
    run(replaced, 0, [2], *late)
    disk.delete_tree()
    replaced.save(*late, Progress(3), [])
    with pytest.raises(LeaseError, match="was deleted, or its disk is gone"):
        replaced.finish()
    assert committed_steps(disk) == []


def test_pruning_spares_what_others_may_be_writing(disk: Storage) -> None:
    own, newer = Claim(disk, "a"), Claim(disk, "a")
    abandoned, of_newer, later = (f"step-{s:09d}/attempt-00000{a}/__0_0.distcp" for s, a in ((1, 1), (1, 2), (9, 1)))
    for name in (abandoned, of_newer, later, "step-000000001/before-claims/__0_0.distcp"):
        disk.write(name, b"x")
    for step in (2, 4, 6):
        disk.write(f"step-{step:09d}/{own.directory}/x", b"x")
        commit(disk, f"step-{step:09d}/{own.directory}", {"step": step, "best": None}, {})

    def files() -> list[str]:
        return [name for name in disk.list_files() if "attempt" in name or "before" in name]

    kept = [f"step-{step:09d}/{own.directory}/x" for step in (4, 6)]
    prune(disk, 2, own)
    assert files() == [of_newer, *kept, later]
    assert committed_steps(disk) == [4, 6]
    prune(disk, 2, newer)
    assert files() == [*kept, later]
    assert "step-000000001" not in disk.list_dirs()


def test_each_of_many_groups_has_a_number_of_its_own_and_only_the_newest_may_commit(disk: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: Claim(disk, "a"), range(8)))
    newest = max(claims, key=lambda claim: claim.number)
    assert len({claim.directory for claim in claims}) == 8
    newest.check()
    for claim in set(claims) - {newest}:
        with pytest.raises(LeaseError):
            claim.check()
