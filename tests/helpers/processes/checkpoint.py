"""One process of two that save and restore checkpoints together, and note which files each of them hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import InfrastructureError
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.sharding import shard
from dpo_ray.train.checkpoint import hashing, manifest, verify
from dpo_ray.train.checkpoint.checkpoint import Best, Checkpoints, Progress
from dpo_ray.train.dtensor import own_part
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.step import train_step
from tests.helpers.training import make_config, make_policy, rank_steps

CONFIG = make_config()


class Noted:
    """Stands in for `digest`: notes each file that is hashed, and may see a file otherwise than it is."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.sees_otherwise = False
        self._real = hashing.digest

    def __call__(self, directory: Storage, name: str) -> str:
        self.files.append(f"{Path(directory.uri).parent.name}/{name}")
        return "otherwise" if self.sees_otherwise else self._real(directory, name)

    def taken(self) -> list[str]:
        files, self.files = self.files, []
        return sorted(files)


def rank_of_two(rank: int, world: int, directory: Path) -> None:
    """Save twice, restore, and restore again after damage and after one rank's; leaves rank-R.json in `directory`."""
    noted, found = Noted(), {}
    for module in (hashing, manifest, verify):
        module.digest = noted
    policy = shard(make_policy(), "cpu", world, torch.float32).train()
    optimizer = build_optimizer(policy, CONFIG.optimizer)
    storage = Storage(directory / "checkpoints")
    checkpoints = Checkpoints(storage, "a-1", 2)
    for step in (1, 2):
        (share,) = rank_steps(world, rank)[step - 1 : step]
        train_step(policy, [packed_rows(m) for m in share.micro_batches], CONFIG, optimizer)
        checkpoints.save(policy, optimizer, Progress(step, best=Best(1, 0.5)), [])
        checkpoints.finish()
        found[f"saved {step}"] = noted.taken()

    def restored() -> Any:
        step = Checkpoints(storage, "a-2", 2).load_newest(policy, optimizer).step
        dist.barrier()
        return step

    before = [own_part(p).detach().clone() for p in policy.parameters()]
    with torch.no_grad():
        for p in policy.parameters():
            own_part(p).fill_(1)
    read: list[str] = []
    real = Storage.read_bytes
    Storage.read_bytes = lambda self, name: read.append(name) or real(self, name)
    found["restored"] = [restored(), noted.taken()]
    found["generators"] = [name for name in read if name.startswith("rng")]
    Storage.read_bytes = real
    found["as it was"] = all(torch.equal(own_part(p), b) for p, b in zip(policy.parameters(), before, strict=True))
    noted.sees_otherwise = rank == 1
    try:
        found["one sees otherwise"] = restored()
    except InfrastructureError as error:
        found["one sees otherwise"] = str(error)
    noted.sees_otherwise = False
    found["and as it is"] = restored()
    if rank == 0:
        file = directory / "checkpoints/step-000000002/attempt-000001/__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    dist.barrier()
    found["damaged"] = restored()
    (directory / f"rank-{rank}.json").write_text(json.dumps(found))
