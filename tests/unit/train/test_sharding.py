"""FSDP2 over two processes gives what one process gives, and its checkpoints are read by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.artifacts.storage import Storage
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from dpo_ray.train.export import gather_policy
from dpo_ray.train.loop import train
from dpo_ray.train.optimizers.build import build_optimizer
from tests.helpers.processes.fsdp import CONFIG, PLAN, train_rank
from tests.helpers.ranks import run_ranks
from tests.helpers.training import STEPS, distance, heldout_sets, make_policy, rank_steps

NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "learning_rate", "num_tokens")
NAMES += ("eval_loss", "eval_first_loss", "eval_single_loss", "eval_single_rewards/accuracies")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run two processes to the end, while nothing else of the test runs."""
    place = tmp_path_factory.mktemp("fsdp")
    run_ranks(train_rank, 2, place)
    return place


def one_process(place: Path, attempt: str) -> tuple[Progress, list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train in this process, without sharding, from the newest checkpoint in `place`; returns where it began too."""
    policy = make_policy(chunk_tokens=16)
    optimizer = build_optimizer(policy, CONFIG.optimizer)
    checkpoints = Checkpoints(Storage(place), attempt, 2)
    began, rows = checkpoints.load_newest(policy, optimizer), []
    steps = rank_steps(1, 0)
    left = steps[began.step :]
    train(policy, optimizer, left, heldout_sets(1, 0), PLAN, CONFIG, checkpoints, began, rows.append)
    return began, rows, gather_policy(policy, torch.float32)


def check_rows(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [r["step"] for r in actual] == [r["step"] for r in expected]
    for a, e in zip(actual, expected, strict=True):
        for name in NAMES:
            assert a.get(name) == (pytest.approx(e[name], rel=1e-5, abs=1e-5) if name in e else None), name


def test_two_processes_train_as_one_does_and_one_goes_on_from_two(two_processes: Path, tmp_path: Path) -> None:
    _, expected_rows, expected = one_process(tmp_path / "checkpoints", "b-1")
    rows = json.loads((two_processes / "metrics.json").read_text())
    assert len(rows) == STEPS
    assert len({r["loss"] for r in rows}) == STEPS
    check_rows(rows, expected_rows)
    assert distance(load_file(two_processes / "policy.safetensors"), expected) < 1e-5
    assert distance(gather_policy(make_policy(), torch.float32), expected) > 1e-3  # the steps were felt

    place = Storage(two_processes / "checkpoints")
    place.delete("step-000000006.json")  # as if they had been killed after step 4's checkpoint
    began, rest, weights = one_process(two_processes / "checkpoints", "b-2")
    assert began.step == 4
    check_rows(rest, expected_rows[4:])
    assert distance(weights, expected) < 1e-5
