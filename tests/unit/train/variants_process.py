"""Train a few steps in one process or several, in every way that must not change the result.

Run as a module: `python -m tests.unit.train.variants_process RANK WORLD DIRECTORY`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_ray.models.lora import add_lora
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.sharding import prepare_blocks, shard
from dpo_ray.train.optimizer import build_optimizer
from dpo_ray.train.step import train_step

from .making import make_config, make_policy, rank_steps

LORA = {"rank": 4, "alpha": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full recomputation": {"activation_checkpointing": "full"},
    "selective recomputation": {"activation_checkpointing": "selective"},
    "offload": {"sharding": {"cpu_offload": True}},
    "adapter": {"lora": LORA},
    "adapter, recomputed": {"lora": LORA, "activation_checkpointing": "full"},
}
HYBRID = {"sharding": {"mode": "hybrid", "shard_workers": 2}}


def main(rank: int, world: int, directory: Path) -> None:
    """Train every variant; rank 0 writes loss and gradient norm of each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    variants = VARIANTS if world < 4 else {"plain": HYBRID, "adapter": HYBRID | {"lora": LORA}}
    measured: dict[str, list[list[float]]] = {}
    for name, facts in variants.items():
        config = make_config(workers=world, **facts)
        policy = make_policy(chunk_tokens=16)
        if config.lora is not None:
            add_lora(policy.model, config.lora, seed=3)
        prepare_blocks(policy, config.activation_checkpointing, compiled=config.compile)
        shard(policy, "cpu", world, torch.float32, config.sharding).train()
        optimizer = build_optimizer(policy, config.optimizer)
        measured[name] = []
        for share in rank_steps(world, rank)[:4]:
            row = train_step(policy, [packed_rows(m) for m in share.micro_batches], config, optimizer)
            measured[name].append([row["loss"], row["grad_norm"]])
    if rank == 0:
        (directory / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
