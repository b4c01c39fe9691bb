"""Adafactor over sharded weights: torch's own, on one whole parameter at a time.

Its means over rows and columns need all of a matrix, and torch's knows plain tensors alone. Each parameter is gathered for its
update, so a rank needs room for the largest one three times; the state is a row and a column a matrix, the same on all ranks.
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
    """Adafactor with relative steps: a parameter moves by the learning rate times its own size."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.learning_rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient; collective."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                whole = gathered(p).detach().clone()
                whole.grad = gathered(p.grad)
                library = torch.optim.Adafactor(
                    [whole], lr=group["lr"], weight_decay=group["weight_decay"], foreach=False
                )
                library.state[whole] = self.state[p]  # which it fills at the first step
                library.step()
                _take(p, whole)


def _take(p: Tensor, whole: Tensor) -> None:
    """Put this rank's part of a whole parameter, the same on all ranks, in its place."""
    if isinstance(p, DTensor):
        part = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)  # without sending anything
        p.to_local().copy_(part.to_local())
    else:
        p.copy_(whole)
