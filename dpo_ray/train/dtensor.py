"""Helpers for sharded tensors: the local shard of this rank, and the full tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(value: Tensor) -> Tensor:
    """Return the local shard of a tensor, not a copy: attributes that are set on it (such as `is_paged`) are kept."""
    return value._local_tensor if isinstance(value, DTensor) else value


def gathered(value: Tensor) -> Tensor:
    """Gather the full tensor on every rank. Collective."""
    if not isinstance(value, DTensor):
        return value
    on_device = value.to(value.device_mesh.device_type)  # an offloaded shard is on the CPU
    assert isinstance(on_device, DTensor)  # noqa: S101 - `to` returns a DTensor for a DTensor
    return on_device.full_tensor()
