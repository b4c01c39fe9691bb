"""Helpers for sharded tensors (DTensor): they return this rank's local shard, or the full tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(value: Tensor) -> Tensor:
    """Return this rank's shard of a tensor; a plain tensor is returned unchanged.

    The result is the shard itself and not a copy, so its attributes (such as `is_paged`) are kept.
    """
    return value._local_tensor if isinstance(value, DTensor) else value


def gathered(value: Tensor) -> Tensor:
    """Gather the full tensor on every rank. Collective: all ranks must call this."""
    if not isinstance(value, DTensor):
        return value
    on_device = value.to(value.device_mesh.device_type)  # an offloaded shard is on the CPU
    assert isinstance(on_device, DTensor)  # noqa: S101 - `to` returns a DTensor for a DTensor
    return on_device.full_tensor()
