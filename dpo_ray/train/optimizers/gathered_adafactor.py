"""Adafactor for sharded weights: torch's implementation, applied to one full parameter at a time.

Adafactor takes means over the rows and columns of a full matrix, and torch's implementation supports plain tensors
only. So each parameter is gathered for its update, and a rank needs memory for three copies of the largest parameter.
The state of a matrix is one row and one column, the same on all ranks.
Source: Shazeer & Stern 2018 (1804.04235); https://docs.pytorch.org/docs/2.13/generated/torch.optim.Adafactor.html
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_ray.config.train import OptimizerConfig
from dpo_ray.train.dtensor import gathered


class GatheredAdafactor(torch.optim.Optimizer):
    """Adafactor with relative steps: the size of an update is the learning rate times the size of the weights."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.learning_rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient. Collective: all ranks must call this."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                whole = gathered(p).detach().clone()
                whole.grad = gathered(p.grad)
                library = torch.optim.Adafactor(
                    [whole], lr=group["lr"], weight_decay=group["weight_decay"], foreach=False
                )
                library.state[whole] = self.state[p]  # filled by the first step
                library.step()
                _take(p, whole)


def _take(p: Tensor, whole: Tensor) -> None:
    """Copy this rank's shard of the full tensor `whole` into the parameter `p`. `whole` is the same on all ranks."""
    if isinstance(p, DTensor):
        part = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)  # None: without communication
        p.to_local().copy_(part.to_local())
    else:
        p.copy_(whole)
