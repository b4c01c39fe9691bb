"""Checkpoints come back bit for bit, damaged ones are passed over, and the metrics join without gap or repeat."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError
from dpo_ray.train.checkpoint.checkpoint import Best, Checkpoints, Progress, oldest_step
from dpo_ray.train.checkpoint.manifest import committed_steps
from dpo_ray.train.rng import seed_rank


class Policy(nn.Module):
    """A little network with matrices, a vector and a tied weight, as real ones have."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


def make(seed: int = 0) -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(seed)
    matrices = [p for p in policy.parameters() if p.ndim > 1]
    vectors = [p for p in policy.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return policy, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def advance(policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    policy(torch.tensor([step % 7, 3, 5])).square().sum().backward()
    optimizer.step()


def state_of(policy: Policy, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    weights = [p.detach().clone() for p in policy.parameters()]
    order = [p for g in optimizer.param_groups for p in g["params"]]
    return weights + [optimizer.state[p][k].clone() for p in order for k in ("step", "exp_avg", "exp_avg_sq")]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(checkpoints: Checkpoints, start: int, stops: list[int], policy: Policy, optimizer) -> dict[int, list]:
    """Train from `start` on, saving at `stops`; returns the state at each stop."""
    states, rows = {}, []
    for step in range(start, stops[-1]):
        advance(policy, optimizer, step)
        rows.append({"step": step + 1, "loss": 1.0 / (step + 1)})
        if step + 1 in stops:
            checkpoints.save(policy, optimizer, Progress(step + 1, 10 * (step + 1), {"passed": True}), rows)
            states[step + 1], rows = state_of(policy, optimizer), []
    checkpoints.finish()
    return states


@pytest.fixture(params=["alone", "gloo"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Return an empty storage, once without a process group and once in a group of one."""
    if request.param == "gloo":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield Storage(tmp_path / "checkpoints")
    if request.param == "gloo":
        dist.destroy_process_group()


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "checkpoints")


def test_round_trip_is_bit_exact(place: Storage) -> None:
    policy, optimizer = make()
    states = run(Checkpoints(place, "a-1", 2), 0, [3], policy, optimizer)
    restored, fresh = make(seed=9)
    progress = Checkpoints(place, "a-2", 2).load_newest(restored, fresh)
    assert progress == Progress(3, 30, {"passed": True})
    assert same(state_of(restored, fresh), states[3])
    assert [g["weight_decay"] for g in fresh.param_groups] == [0.1, 0.0]
    assert restored.head.weight is restored.embed.weight
    for step in range(3, 6):  # and what follows is the same too
        advance(policy, optimizer, step)
        advance(restored, fresh, step)
    assert same(state_of(restored, fresh), state_of(policy, optimizer))


def test_without_a_checkpoint_nothing_is_touched(place: Storage) -> None:
    policy, optimizer = make()
    before = [p.detach().clone() for p in policy.parameters()]
    assert Checkpoints(place, "a-1", 2).load_newest(policy, optimizer) == Progress()
    assert same([p.detach() for p in policy.parameters()], before)
    assert not optimizer.state


def test_the_newest_is_taken_and_only_the_newest_are_kept(disk: Storage) -> None:
    states = run(Checkpoints(disk, "a-1", 2), 0, [2, 4, 10, 12], *make())
    assert committed_steps(disk) == [10, 12]
    assert [d for d in disk.list_dirs() if d.startswith("step-")] == ["step-000000010", "step-000000012"]
    policy, optimizer = make(9)
    assert Checkpoints(disk, "a-2", 2).load_newest(policy, optimizer).step == 12
    assert same(state_of(policy, optimizer), states[12])


def test_the_oldest_that_is_kept_is_where_training_may_begin_again(disk: Storage) -> None:
    assert oldest_step(disk) == 0
    run(Checkpoints(disk, "a-1", 2), 0, [2, 4, 10, 12], *make())
    assert oldest_step(disk) == 10
    disk.write("damaged/step-000000004.json", b"{}")
    assert oldest_step(disk) == 10


def test_three_are_kept_where_three_are_asked_for(disk: Storage) -> None:
    run(Checkpoints(disk, "a-1", 3), 0, [1, 2, 3, 4], *make())
    assert [d for d in disk.list_dirs() if d.startswith("step-")] == [f"step-{s:09d}" for s in (2, 3, 4)]


def weights_file(root: Path) -> Path:
    return max((root / "step-000000004").rglob("*.distcp"), key=lambda f: f.stat().st_size)


def truncate(root: Path) -> None:
    file = weights_file(root)
    file.write_bytes(file.read_bytes()[:-1])


def empty(root: Path) -> None:
    weights_file(root).write_bytes(b"")


def halve(root: Path) -> None:
    file = weights_file(root)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def make_unreadable(root: Path) -> None:
    file = weights_file(root)
    file.unlink()
    file.mkdir()  # reading it fails, for root as well


def make_the_manifest_unreadable(root: Path) -> None:
    manifest = root / "step-000000004.json"
    manifest.unlink()
    manifest.symlink_to(manifest.name)  # a loop


def resign(root: Path, **changes: object) -> None:
    """Change the manifest, and its own digest with it."""
    manifest = root / "step-000000004.json"
    content = json.loads(manifest.read_text()) | changes
    del content["digest"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(content | {"digest": digest}))


def say_another_step(root: Path) -> None:
    resign(root, step=6)


def say_another_configuration(root: Path) -> None:
    resign(root, identity="another")


def flip_a_bit(root: Path) -> None:
    data = bytearray(weights_file(root).read_bytes())
    data[len(data) // 2] ^= 0x10
    weights_file(root).write_bytes(data)


def flip_a_bit_of_the_pickle(root: Path) -> None:
    (file,) = (root / "step-000000004").rglob(".metadata")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x01
    file.write_bytes(data)


def remove_a_file(root: Path) -> None:
    weights_file(root).unlink()


def remove_all_files(root: Path) -> None:
    for file in (root / "step-000000004").rglob("*"):
        if file.is_file():
            file.unlink()


def write_manifest(text: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "step-000000004.json").write_bytes(text) and None


def change_the_step(root: Path) -> None:
    manifest = root / "step-000000004.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "step": 5}))  # one digit: the data cursor would be wrong


def lead_elsewhere(root: Path) -> None:
    manifest = root / "step-000000004.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "directory": "../outside"}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        halve,
        make_unreadable,
        say_another_step,
        say_another_configuration,
        flip_a_bit,
        flip_a_bit_of_the_pickle,
        remove_a_file,
        remove_all_files,
        change_the_step,
        lead_elsewhere,
        *(write_manifest(t) for t in (b"", b"{", b"\xff\xfe garbage", b"[]", b"null", b'"x"', b'{"digest": "x"}')),
    ],
)
def test_a_damaged_newest_is_set_aside(damage: Callable[[Path], None], disk: Storage, caplog) -> None:
    states = run(Checkpoints(disk, "a-1", 2), 0, [2, 4], *make())
    damage(disk.local_path())
    broken = disk.read_bytes("step-000000004.json")
    policy, optimizer = make(9)
    checkpoints = Checkpoints(disk, "a-2", 2)
    assert checkpoints.load_newest(policy, optimizer).step == 2
    assert same(state_of(policy, optimizer), states[2])
    assert "step-000000004.json is damaged" in caplog.text
    assert disk.read_bytes("damaged/step-000000004.json") == broken
    assert disk.read_bytes("damaged/step-000000004.reason")
    assert not disk.exists("step-000000004.json")
    # The steps are done again, under the same names.
    again = run(checkpoints, 2, [4], policy, optimizer)
    assert same(again[4], states[4])
    fresh = make(8)
    assert Checkpoints(disk, "a-3", 2).load_newest(*fresh).step == 4
    assert same(state_of(*fresh), states[4])


def test_without_a_manifest_files_are_no_checkpoint(disk: Storage) -> None:
    states = run(Checkpoints(disk, "a-1", 2), 0, [2, 4], *make())
    disk.delete("step-000000004.json")  # killed just before the commit
    policy, optimizer = make(9)
    checkpoints = Checkpoints(disk, "a-2", 2)
    assert checkpoints.load_newest(policy, optimizer).step == 2
    assert same(state_of(policy, optimizer), states[2])
    run(checkpoints, 2, [3, 5, 7], policy, optimizer)
    assert not disk.list_files("step-000000004")  # and what lay there is cleared away in time


def test_all_damaged_means_from_the_start(disk: Storage) -> None:
    run(Checkpoints(disk, "a-1", 2), 0, [2, 4], *make())
    for name in ("step-000000002.json", "step-000000004.json"):
        disk.write(name, b"{}")
    policy, optimizer = make()
    checkpoints = Checkpoints(disk, "a-2", 2)
    assert checkpoints.load_newest(policy, optimizer) == Progress()
    run(checkpoints, 0, [3], policy, optimizer)
    assert [row["step"] for row in checkpoints.metrics(3)] == [1, 2, 3]


def test_metrics_join_after_a_resume_from_an_older_checkpoint(disk: Storage) -> None:
    """The second attempt cuts its segments elsewhere; nothing of the abandoned steps may show through."""
    first, policy, optimizer = Checkpoints(disk, "a-1", 2), *make()
    rows = [{"step": s, "attempt": 1} for s in range(1, 7)]
    for start, stop in ((0, 2), (2, 4), (4, 6)):
        for step in range(start, stop):
            advance(policy, optimizer, step)
        first.save(policy, optimizer, Progress(stop), rows[start:stop])
    first.finish()
    for name in ("step-000000004.json", "step-000000006.json"):
        disk.write(name, b"{")
    second, policy, optimizer = Checkpoints(disk, "a-2", 2), *make()
    assert second.load_newest(policy, optimizer) == Progress()
    for start, stop in ((0, 3), (3, 5), (5, 8)):
        for step in range(start, stop):
            advance(policy, optimizer, step)
        second.save(policy, optimizer, Progress(stop), [{"step": s + 1, "attempt": 2} for s in range(start, stop)])
        second.finish()
        assert second.metrics(stop) == [{"step": s, "attempt": 2} for s in range(1, stop + 1)]


def test_metrics_before_the_restored_step_are_kept(disk: Storage) -> None:
    first, policy, optimizer = Checkpoints(disk, "a-1", 2), *make()
    for start, stop in ((0, 2), (2, 4)):
        for step in range(start, stop):
            advance(policy, optimizer, step)
        first.save(policy, optimizer, Progress(stop), [{"step": s + 1, "attempt": 1} for s in range(start, stop)])
    first.finish()
    flip_a_bit(disk.local_path())
    second, policy, optimizer = Checkpoints(disk, "a-2", 2), *make()
    assert second.load_newest(policy, optimizer).step == 2
    for start, stop in ((2, 3), (3, 5)):
        for step in range(start, stop):
            advance(policy, optimizer, step)
        second.save(policy, optimizer, Progress(stop), [{"step": s + 1, "attempt": 2} for s in range(start, stop)])
    second.finish()
    assert [(r["step"], r["attempt"]) for r in second.metrics(5)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert [r["step"] for r in second.metrics(3)] == [1, 2, 3]


def test_a_manifest_that_cannot_be_read_is_passed_over(disk: Storage, caplog) -> None:
    states = run(Checkpoints(disk, "a-1", 2), 0, [2, 4], *make())
    make_the_manifest_unreadable(disk.local_path())
    policy, optimizer = make(9)
    assert Checkpoints(disk, "a-2", 2).load_newest(policy, optimizer).step == 2
    assert same(state_of(policy, optimizer), states[2])


def test_what_is_saved_is_the_state_at_the_call(place: Storage) -> None:
    """Weights change right after, while the files are being written: what is read back is what was there before."""
    policy, optimizer = make()
    for step in range(6):
        checkpoints = Checkpoints(place, "a-1", 2)
        advance(policy, optimizer, step)
        before = state_of(policy, optimizer)
        checkpoints.save(policy, optimizer, Progress(step + 1), [])
        with torch.no_grad():
            for p in policy.parameters():
                p.fill_(float("nan"))
            for state in optimizer.state.values():
                state["exp_avg"].fill_(float("nan"))
        checkpoints.finish()
        assert Checkpoints(place, "a-2", 2).load_newest(policy, optimizer).step == step + 1
        assert same(state_of(policy, optimizer), before)


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


def test_the_random_generators_go_on_where_they_were(place: Storage) -> None:
    seed_rank(7, 0)
    policy, optimizer = make()
    draws()
    np.random.standard_normal()  # numpy keeps the second of a pair
    checkpoints = Checkpoints(place, "a-1", 2)
    checkpoints.save(policy, optimizer, Progress(1), [])
    expected = [draws(), float(np.random.standard_normal())]
    checkpoints.finish()
    seed_rank(8, 0)
    Checkpoints(place, "a-2", 2).load_newest(policy, optimizer)
    assert [draws(), float(np.random.standard_normal())] == expected


@pytest.mark.parametrize("states", [["rng-0.json", "rng-1.json"], ["rng.json"]])  # the latter of an earlier version
def test_without_a_state_for_each_rank_the_random_generators_are_seeded_by_seed_rank_and_step(
    states: list[str], disk: Storage
) -> None:
    policy, optimizer = make()
    run(Checkpoints(disk, "a-1", 2), 0, [4], policy, optimizer)
    generators = disk.child("step-000000004", "attempt-000001")
    state = generators.read_bytes("rng-0.json")
    generators.delete("rng-0.json")
    for name in states:
        generators.write(name, state)
    resign(disk.local_path(), files=digests(disk.local_path() / "step-000000004" / "attempt-000001"))
    Checkpoints(disk, "a-2", 2, seed=5).load_newest(policy, optimizer)
    found = draws()
    seed_rank(5, 0, 4)
    assert draws() == found
    seed_rank(5, 1, 4)
    assert draws() != found


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


def saved_with_best(disk: Storage, bests: list[tuple[int, int]]) -> dict[int, list[torch.Tensor]]:
    """Save at each (step, best step so far)."""
    checkpoints, (policy, optimizer), states = Checkpoints(disk, "a-1", 2), make(), {}
    for step, best in bests:
        advance(policy, optimizer, step)
        states[step] = state_of(policy, optimizer)
        checkpoints.save(policy, optimizer, Progress(step, best=Best(best, 0.5, step - best)), [])
    checkpoints.finish()
    return states


def test_the_best_checkpoint_of_all_that_are_kept_is_kept(disk: Storage) -> None:
    states = saved_with_best(disk, [(1, 1), (2, 1), (3, 1), (4, 1), (5, 5)])
    assert committed_steps(disk) == [1, 4, 5]
    assert [d for d in disk.list_dirs() if d.startswith("step-")] == [f"step-{s:09d}" for s in (1, 4, 5)]
    policy, optimizer = make(9)
    checkpoints = Checkpoints(disk, "a-2", 2)
    assert checkpoints.load_newest(policy, optimizer) == Progress(5, best=Best(5, 0.5, 0))
    checkpoints.load(policy, optimizer, 1)
    assert same(state_of(policy, optimizer), states[1])
    saved_with_best(disk, [(6, 5)])
    assert committed_steps(disk) == [5, 6]


def test_a_checkpoint_whose_best_one_is_damaged_is_not_gone_on_from(disk: Storage) -> None:
    """The best weights could not be exported at the end: training goes back to before them, and makes them again."""
    saved_with_best(disk, [(1, 1), (3, 3), (4, 3), (5, 3)])
    assert committed_steps(disk) == [3, 4, 5]
    (file,) = (disk.local_path() / "step-000000003").rglob("rng-0.json")
    file.write_bytes(b"")
    policy, optimizer = make(9)
    checkpoints = Checkpoints(disk, "a-2", 2)
    with pytest.raises(ArtifactError, match=r"rng-0\.json is not what was written"):
        checkpoints.load(policy, optimizer, 3)
    assert checkpoints.load_newest(policy, optimizer) == Progress()
    assert committed_steps(disk) == []


def test_a_checkpoint_that_cannot_be_written_is_an_error_at_the_next_boundary(tmp_path: Path) -> None:
    checkpoints, (policy, optimizer) = Checkpoints(Storage(tmp_path / "checkpoints"), "a-1", 2), make()
    (tmp_path / "checkpoints" / "step-000000001").write_text("a file, where a directory is needed")
    advance(policy, optimizer, 0)
    checkpoints.save(policy, optimizer, Progress(1), [])
    with pytest.raises(ArtifactError, match="could not be written"):
        checkpoints.finish()
