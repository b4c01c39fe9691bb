"""A rank of two is killed at every point of a step and of a commit; the end is bit for bit that of a quiet training.

Here the ranks are plain processes that begin in a second. The same under Ray Train: tests/chaos/test_kill_training.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from dpo_ray.artifacts.storage import Storage
from dpo_ray.models.sharding import shard
from dpo_ray.schedule.files import RankStep
from dpo_ray.train.checkpoint.checkpoint import Checkpoints
from dpo_ray.train.export import gather_policy
from dpo_ray.train.loop import Extent, train
from dpo_ray.train.optimizers.build import build_optimizer
from tests.helpers.ranks import run_ranks
from tests.helpers.training import GROUPS_PER_STEP, STEPS, make_config, make_policy, rank_steps
from tests.helpers.traps import POINTS, arm_trap, armed_traps, set_next_trap

EVERY = 2  # steps from checkpoint to checkpoint
CONFIG = make_config(checkpoint_every_steps=EVERY)
PLAN = Extent(total_steps=STEPS, groups=STEPS * GROUPS_PER_STEP, device=torch.device("cpu"))


def train_rank(rank: int, world: int, root: Path, attempt: str, steps: list[list[RankStep]]) -> None:
    """Train from the newest checkpoint; rank 0 notes where it began, and leaves the weights and the metrics."""
    policy = shard(make_policy(), "cpu", world, torch.float32).train()
    optimizer = build_optimizer(policy, CONFIG.optimizer)
    checkpoints = Checkpoints(Storage(root / "checkpoints"), attempt, 2)
    progress = checkpoints.load_newest(policy, optimizer)
    if rank == 0:
        (root / f"{attempt}.began").write_text(str(progress.step))
    set_next_trap(root, rank)
    train(policy, optimizer, steps[rank][progress.step :], {}, PLAN, CONFIG, checkpoints, progress, lambda row: None)
    weights = gather_policy(policy, torch.float32)
    if rank == 0:
        save_file({name: w.clone() for name, w in weights.items()}, root / "policy.safetensors")
        losses = [[row["step"], row["loss"], row["grad_norm"]] for row in checkpoints.metrics(STEPS)]
        (root / "losses.json").write_text(json.dumps(losses))


@pytest.mark.slow
def test_a_rank_killed_at_every_point_of_a_step_and_of_a_commit(tmp_path: Path) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    steps = [rank_steps(2, rank) for rank in range(2)]
    run_ranks(train_rank, 2, quiet, "a-1", steps)
    for number, point in enumerate(POINTS.values()):
        arm_trap(killed, f"{number:02d}", "kill", *point)
    attempts = 0
    while True:
        attempts += 1
        armed = armed_traps(killed)
        try:
            run_ranks(train_rank, 2, killed, f"a-{attempts}", steps)
            break
        except (ProcessExitedException, ProcessRaisedException):
            assert armed_traps(killed) == armed[1:], "the workers failed by themselves"
    assert attempts == len(POINTS) + 1
    began = [int((killed / f"a-{n}.began").read_text()) for n in range(1, attempts + 1)]
    assert began == sorted(began)  # no committed checkpoint is lost
    assert began[0] == 0
    assert began[-1] >= EVERY
    expected, weights = (load_file(root / "policy.safetensors") for root in (quiet, killed))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (killed / "losses.json").read_text() == (quiet / "losses.json").read_text()
    assert len(json.loads((quiet / "losses.json").read_text())) == STEPS
