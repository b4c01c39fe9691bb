"""Construction of the optimizer, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dpo_ray.config.train import OptimizerConfig

from .blockwise_adamw import BlockwiseAdamW
from .gathered_adafactor import GatheredAdafactor


def build_optimizer(policy: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer of all trainable parameters. Matrices have weight decay; vectors (norms, biases) do not.

    RMSprop is the optimizer of the DPO paper (2305.18290, appendix B).
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    match config.type:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        case "adamw_8bit" | "paged_adamw" | "paged_adamw_8bit":
            bits = 8 if config.type.endswith("8bit") else 32
            return BlockwiseAdamW(groups, config, bits=bits, paged=config.type.startswith("paged"))
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=config.learning_rate, alpha=config.betas[1], eps=config.eps)
        case "adafactor":
            return GatheredAdafactor(groups, config)


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Compute the factor of the learning rate at a step (the first step is 0): linear warm-up, then decay.

    The factor is never 0, so that every step updates the weights. A warm-up of w steps starts at 1 / (w + 1), whereas
    the schedules of transformers start at 0
    (https://huggingface.co/docs/transformers/main_classes/optimizer_schedules). As in transformers, cosine, linear and
    wsd (warm-up, stable, decay) end just above 0, and inverse_sqrt decays as 1 / sqrt(step / warm-up steps). Without a
    warm-up, inverse_sqrt decays as 1 / sqrt(1 + step / 10,000).
    """
    warmup_steps = (
        config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_fraction * total_steps)
    )
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match config.decay:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "inverse_sqrt":
            timescale = warmup_steps or 10_000
            return 1.0 / math.sqrt((step - warmup_steps + timescale) / timescale)
        case "wsd":
            decay_steps = math.ceil(config.decay_fraction * total_steps)
            return max(0.0, min(1.0, (total_steps - step) / decay_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Set the learning rate of `step` and return the rate. Checkpoints do not store it: it depends only on the step."""
    rate = config.learning_rate * learning_rate_factor(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
