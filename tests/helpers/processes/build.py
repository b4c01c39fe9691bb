"""One rank that builds policies from slices of their files, started by the test of building."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dpo_ray.config.train import LoraConfig, TrainConfig
from dpo_ray.models.build import build_policy
from dpo_ray.models.load import as_policy, load_policy
from dpo_ray.models.lora import add_lora
from dpo_ray.models.sharding import prepare_blocks, shard
from dpo_ray.models.sliced_weights import fill_shards, find_slices
from dpo_ray.models.token_logps import TokenLogps

CPU, WHOLE = torch.device("cpu"), LoraConfig(rank=2, alpha=4, merge=True)
# By case: the family, whether an adapter is merged into it, and what else the recipe says.
CASES: dict[str, tuple[str, bool, TrainConfig]] = {
    "llama": ("llama", False, TrainConfig()),
    "tied": ("gemma2", False, TrainConfig(activation_checkpointing="full")),
    "padded": ("qwen2", False, TrainConfig.model_validate({"layout": "padded"})),
    "offloaded": ("llama", False, TrainConfig.model_validate({"sharding": {"cpu_offload": True}})),
    "bfloat16 files": ("bfloat16", False, TrainConfig()),
    "adapter": ("llama", True, TrainConfig()),
    "adapter on bfloat16 files": ("bfloat16", True, TrainConfig()),
    "lora": ("llama", False, TrainConfig(lora=WHOLE)),
    "lora on adapter": ("llama", True, TrainConfig(lora=WHOLE, activation_checkpointing="selective")),
}


def build_rank(rank: int, world: int, directory: Path) -> None:
    """Build each case; leave in RANK.json whether it is what a whole model is, and how much of the files was read."""
    found = {case: _equal(directory, *facts) for case, facts in CASES.items()}
    read = {family: _read(directory / family, world) for family in ("llama", "gemma2")}
    (directory / f"{world}-{rank}.json").write_text(json.dumps({"equal": found, "read": read}))


def _equal(directory: Path, family: str, adapted: bool, config: TrainConfig) -> bool:
    adapter = directory / "adapter" if adapted else None
    sliced = build_policy(directory / family, adapter, config, torch.float32, CPU, seed=5)
    whole = load_policy(directory / family, torch.float32, 1024, adapter, config.layout)
    if config.lora is not None:
        add_lora(whole.model, config.lora, seed=5)
    prepare_blocks(whole, config.activation_checkpointing, compiled=False)
    shard(whole, "cpu", dist.get_world_size(), torch.float32, config.sharding)
    return _state(sliced) == _state(whole)


def _state(policy: TokenLogps) -> dict[str, tuple[str, bool, bytes]]:
    """Return the bits of every parameter (the part of this rank) and of every buffer (whole)."""
    held = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in policy.named_parameters()}
    states = {n: (t, policy.get_parameter(n).requires_grad) for n, t in held.items()}
    states |= {n: (b, b.requires_grad) for n, b in policy.named_buffers()}
    return {n: (str(t.dtype), g, t.detach().contiguous().numpy().tobytes()) for n, (t, g) in states.items()}


def _read(directory: Path, world: int) -> int:
    weights = find_slices(directory, None)
    policy = as_policy(weights.model, 16, "shared", "")
    return fill_shards(shard(policy, "cpu", world, torch.float32), weights, CPU, torch.float32, 0)
