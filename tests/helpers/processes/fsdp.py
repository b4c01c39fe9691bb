"""One process of a sharded training run, started by the test of sharding."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dpo_ray.artifacts.storage import Storage
from dpo_ray.models.sharding import shard
from dpo_ray.train.checkpoint.checkpoint import Checkpoints
from dpo_ray.train.export import gather_policy
from dpo_ray.train.loop import Extent, train
from dpo_ray.train.optimizers.build import build_optimizer
from tests.helpers.training import GROUPS_PER_STEP, STEPS, heldout_sets, make_config, make_policy, rank_steps

PLAN = Extent(total_steps=STEPS, groups=STEPS * GROUPS_PER_STEP, device=torch.device("cpu"))
CONFIG = make_config(checkpoint_every_steps=4, eval_every_steps=3)


def train_rank(rank: int, world: int, directory: Path) -> None:
    """Train all steps as one rank of a gloo world; rank 0 leaves metrics.json and policy.safetensors in `directory`."""
    policy = shard(make_policy(chunk_tokens=16), "cpu", world, torch.float32).train()
    optimizer = build_optimizer(policy, CONFIG.optimizer)
    checkpoints = Checkpoints(Storage(directory / "checkpoints"), "a-1", 2)
    progress = checkpoints.load_newest(policy, optimizer)
    rows: list[dict[str, float]] = []
    steps = rank_steps(world, rank)
    train(policy, optimizer, steps, heldout_sets(world, rank), PLAN, CONFIG, checkpoints, progress, rows.append)
    weights = gather_policy(policy, torch.float32)
    if rank == 0:
        (directory / "metrics.json").write_text(json.dumps(rows))
        save_file({n: w.clone() for n, w in weights.items()}, directory / "policy.safetensors")
