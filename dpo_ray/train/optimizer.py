"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from dpo_ray.config.train import OptimizerConfig


def build_optimizer(policy: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make AdamW over all parameters; matrices decay, vectors (norms, biases) do not."""
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Compute the factor on the learning rate for 0-based `step`: linear warm-up, then the decay to 0 at `total_steps`.

    As in transformers' schedules, the first step of a warm-up has rate 0 and the last step a rate just above 0.
    """
    warmup_steps = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match config.decay:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Set the rate of `step` and return it. A pure function of the step: nothing to save, nothing to restore."""
    rate = config.learning_rate * learning_rate_factor(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
