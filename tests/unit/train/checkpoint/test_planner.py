"""Plans are made once in a run and anew where tensors change; what is written is what it would be without that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import SavePlan

from dpo_ray.artifacts.storage import Storage
from dpo_ray.train.checkpoint import checkpoint
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from dpo_ray.train.checkpoint.planner import SharedPlanner
from tests.unit.train.checkpoint.test_checkpoint import Policy, make, run, same, state_of


def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many ranks each plan that is made is for."""
    real, made = default_planner.create_default_global_save_plan, []

    def noted(plans: list[SavePlan]) -> object:
        made.append(len(plans))
        return real(plans)

    monkeypatch.setattr(default_planner, "create_default_global_save_plan", noted)
    return made


def test_a_run_plans_once_and_each_run_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(monkeypatch)
    run(Checkpoints(Storage(tmp_path / "one"), "a-1", 5), 0, [1, 2, 3], *make())
    assert made == [1]
    run(Checkpoints(Storage(tmp_path / "two"), "a-1", 5), 0, [1, 2], *make())
    assert made == [1, 1]


def test_files_are_those_of_saves_that_plan_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Checkpoints(Storage(tmp_path / "shared"), "a-1", 5), 0, [1, 2, 3], *make())
    monkeypatch.setattr(checkpoint, "SharedPlanner", lambda owner: DefaultSavePlanner())
    run(Checkpoints(Storage(tmp_path / "anew"), "a-1", 5), 0, [1, 2, 3], *make())
    for step in (1, 2, 3):
        shared, anew = (tmp_path / place / f"step-{step:09d}/attempt-000001" for place in ("shared", "anew"))
        assert (shared / "__0_0.distcp").read_bytes() == (anew / "__0_0.distcp").read_bytes()
        known, expected = (FileSystemReader(place).read_metadata() for place in (shared, anew))
        assert known.state_dict_metadata == expected.state_dict_metadata
        assert known.storage_data == expected.storage_data
        assert known.planner_data == expected.planner_data


class Wider(Policy):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.more = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.more(self.norm(self.embed(ids))))


def test_other_tensors_are_planned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, place = planned(monkeypatch), Storage(tmp_path)
    checkpoints = Checkpoints(place, "a-1", 5)
    run(checkpoints, 0, [1, 2], *make())
    wider = Wider()
    optimizer = torch.optim.AdamW(wider.parameters(), lr=1e-2)
    states = run(checkpoints, 2, [3, 4], wider, optimizer)
    assert made == [1, 1]
    restored = Wider(seed=9)
    fresh = torch.optim.AdamW(restored.parameters(), lr=1e-2)
    assert Checkpoints(place, "a-2", 5).load_newest(restored, fresh) == Progress(4, 40, {"passed": True})
    assert same(state_of(restored, fresh), states[4])


def test_plans_that_rank_0_never_saw_are_an_error() -> None:
    """As if it alone had been started again: DCP would leave the other ranks' tensors out, and say nothing."""
    planner = SharedPlanner("nobody")
    planner.set_up_planner({}, is_coordinator=True)
    with pytest.raises(RuntimeError, match="rank 0 has no such plans"):
        planner.create_global_plan([SavePlan([]), SavePlan([], usable=False)])
