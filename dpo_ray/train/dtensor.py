"""Sharded tensors: the part that this rank holds, and the whole."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(value: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: the memory itself, with what is noted on it (pages)."""
    return value._local_tensor if isinstance(value, DTensor) else value


def gathered(value: Tensor) -> Tensor:
    """Gather a tensor on every rank; collective."""
    if not isinstance(value, DTensor):
        return value
    on_device = value.to(value.device_mesh.device_type)  # an offloaded shard is on the CPU
    assert isinstance(on_device, DTensor)  # noqa: S101 - `to` keeps it one
    return on_device.full_tensor()
