"""One process of a sharded training run with each of the optimizers whose kernels or means need more than torch's own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.train import OptimizerConfig
from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.sharding import shard
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from dpo_ray.train.export import gather_policy
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.step import train_step
from tests.helpers.training import make_config, optimizer_config, rank_steps

OPTIMIZERS: dict[str, OptimizerConfig] = {
    "adamw": optimizer_config(),
    "paged_adamw": optimizer_config(type="paged_adamw"),
    "adamw_8bit": optimizer_config(type="adamw_8bit"),
    "adafactor": optimizer_config(type="adafactor", learning_rate=0.02),
}
SAVED = 2  # steps before the checkpoint
# Rows of 256 and of 512 values: whole blocks of 8-bit state. Norms, and matrices with few rows, are cut to nothing on a rank.
MODEL = LlamaConfig(
    vocab_size=704, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, head_dim=32
)


def make_model(directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32).save_pretrained(directory)
    return directory


def train_steps(
    model: Path, name: str, world: int, rank: int, first: int, last: int, checkpoints: Path | None, *, save: bool
) -> dict[str, Tensor]:
    """Train from step `first` (of which there is a checkpoint, unless it is 0) to `last`; returns all weights."""
    torch.set_num_threads(1)  # of more, sums may be rounded otherwise
    policy = load_policy(model, torch.float32, 1024).train()
    if world > 1:
        shard(policy, "cpu", world, torch.float32)
    config = make_config(optimizer=OPTIMIZERS[name])
    optimizer = build_optimizer(policy, config.optimizer)
    commits = None if checkpoints is None else Checkpoints(Storage(checkpoints), f"{world}-{first}", 2)
    if commits is not None and first:
        assert commits.load_newest(policy, optimizer).step == first
    for share in rank_steps(world, rank)[first:last]:
        train_step(policy, [packed_rows(m) for m in share.micro_batches], config, optimizer)
    if commits is not None and save:
        commits.save(policy, optimizer, Progress(last), [])
        commits.finish()
    return gather_policy(policy, torch.float32)


def train_rank(rank: int, world: int, directory: Path) -> None:
    """Train with every optimizer, as one rank, through a checkpoint; rank 0 leaves the weights in `directory`."""
    for name in OPTIMIZERS:
        checkpoints = directory / name
        train_steps(directory / "model", name, world, rank, 0, SAVED, checkpoints, save=True)
        weights = train_steps(directory / "model", name, world, rank, SAVED, 4, checkpoints, save=False)
        if rank == 0:
            save_file({n: w.clone() for n, w in weights.items()}, directory / f"{name}.safetensors")
