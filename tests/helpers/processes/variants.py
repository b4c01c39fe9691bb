"""Train a few steps as one rank of a group, in every way that must not change the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dpo_ray.config.train import LoraConfig
from dpo_ray.models.build import build_policy
from dpo_ray.models.builtin import builtin_model
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.train.export import gather_policy
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.step import train_step
from tests.helpers.training import make_config, rank_steps

LORA = {"rank": 4, "alpha": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full recomputation": {"activation_checkpointing": "full"},
    "selective recomputation": {"activation_checkpointing": "selective"},
    "offload": {"sharding": {"cpu_offload": True}},
    "adapter": {"lora": LORA},
    "adapter, recomputed": {"lora": LORA, "activation_checkpointing": "full"},
    "adapter, recomputed selectively": {"lora": LORA, "activation_checkpointing": "selective"},
    "adapter, offloaded": {"lora": LORA, "sharding": {"cpu_offload": True}},
}
COMPILED: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "compiled, recomputed": {"compile": True, "activation_checkpointing": "selective"},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    "quantized": {"lora": LORA, "quantization": "nf4"},
    "quantized, recomputed": {"lora": LORA, "quantization": "nf4", "activation_checkpointing": "full"},
}
HYBRID = {"sharding": {"mode": "hybrid", "shard_workers": 2}}


def train_variants(rank: int, world: int, directory: Path, asked: str) -> None:
    """Train the variants that are asked for (all, compiled, quantized).

    Rank 0 writes loss and gradient norm of each step, and the exported adapters.
    """
    variants = VARIANTS if world < 4 else {"plain": HYBRID, "adapter": HYBRID | {"lora": LORA}}
    measured: dict[str, list[list[float]]] = {}
    for name, facts in {"compiled": COMPILED, "quantized": QUANTIZED}.get(asked, variants).items():
        config = make_config(workers=world, **facts)
        source, cpu = builtin_model("sentiment_llama"), torch.device("cpu")
        policy = build_policy(source, None, config, torch.float32, cpu, seed=3).train()
        optimizer = build_optimizer(policy, config.optimizer)
        measured[name] = []
        for share in rank_steps(world, rank)[:4]:
            row = train_step(policy, [packed_rows(m) for m in share.micro_batches], config, optimizer)
            measured[name].append([row["loss"], row["grad_norm"]])
        if config.lora is not None:
            save(gather_policy(policy, torch.float32, config.lora), directory / f"{name}.safetensors", rank)
            if config.quantization is not None:
                continue
            # With an adapter of which nothing is left, the model is what it was.
            for parameter in (p for n, p in policy.named_parameters() if ".lora_B." in n):
                parameter.detach().zero_()
            whole = LoraConfig.model_validate(LORA | {"merge": True})
            save(gather_policy(policy, torch.float32, whole), directory / f"base of {name}.safetensors", rank)
    if rank == 0:
        (directory / "measured.json").write_text(json.dumps(measured))


def save(weights: dict[str, torch.Tensor], path: Path, rank: int) -> None:
    """Write what rank 0 gathered."""
    if rank == 0:
        save_file({name: w.clone() for name, w in weights.items()}, path)
