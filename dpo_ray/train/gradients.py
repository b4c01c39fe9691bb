"""Gradient norms over the shards of all ranks, and gradient clipping."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .dtensor import own_part

GROUPS = ("embed", "attention", "mlp", "norm", "head", "other")


def clip_gradients(policy: nn.Module, max_norm: float | None) -> tuple[float, dict[str, float]]:
    """Scale all gradients down if their norm over the shards of all ranks is above `max_norm` (None: no limit).

    Collective: all ranks must call this.

    Returns:
        The norm before clipping, and the norm of each part of the model (GROUPS) as `grad_norm/GROUP`. Parts without
        gradients are omitted.
    """
    squares = torch.zeros(len(GROUPS), dtype=torch.float64)
    with_gradients = [(name, p.grad) for name, p in policy.named_parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(own_part(gradient), dtype=torch.float32) for _, gradient in with_gradients]
    own = torch.stack(norms).tolist() if norms else []  # one transfer: each read of a GPU value synchronises
    for (name, gradient), norm in zip(with_gradients, own, strict=True):
        squares[GROUPS.index(group_of(name))] += norm**2 / _copies(gradient)
    sharded = any(isinstance(gradient, DTensor) for _, gradient in with_gradients)
    if sharded and dist.get_world_size() > 1:
        placed = squares.to("cuda" if "nccl" in dist.get_backend() else "cpu")
        dist.all_reduce(placed)
        squares = placed.cpu()
    norm = float(squares.sum().sqrt())
    if max_norm is not None:
        scale = max_norm / (norm + 1e-6)  # the same epsilon as torch.nn.utils.clip_grad_norm_
        if scale < 1.0:
            for _, gradient in with_gradients:
                own_part(gradient).mul_(scale)
    return norm, {f"grad_norm/{g}": s**0.5 for g, s in zip(GROUPS, squares.tolist(), strict=True) if s > 0}


def _copies(gradient: Tensor) -> int:
    """Count the ranks that hold the same shard of a gradient: more than 1 with replicas (HSDP)."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(mesh.size(i) for i, placed in enumerate(gradient.placements) if placed.is_replicate())


def group_of(name: str) -> str:
    """Return the part of the model (one of GROUPS) to which the parameter with this name belongs."""
    parts = name.lower().split(".")
    if any("embed" in part or part == "wte" for part in parts):
        return "embed"
    if any("norm" in part for part in parts):
        return "norm"
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any("mlp" in part or "expert" in part or "feed_forward" in part for part in parts):
        return "mlp"
    return "head" if any("lm_head" in part or "output" in part for part in parts) else "other"
