"""FSDP2: shard the policy over the ranks, block by block."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dpo_ray.models.token_logps import TokenLogps


def shard(policy: TokenLogps, device_type: str, world_size: int, compute_dtype: torch.dtype) -> TokenLogps:
    """Shard each block and the root over all ranks; float32 master weights and reductions, `compute_dtype` in forward.

    Source: https://docs.pytorch.org/docs/2.13/distributed.fsdp.fully_shard.html
    """
    mesh = init_device_mesh(device_type, (world_size,))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in blocks(policy):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    root = fully_shard(policy, mesh=mesh, mp_policy=precision)
    assert isinstance(root, FSDPModule)  # noqa: S101 - fully_shard's type does not say so
    # The loss is already divided by the whole step's weight: gradients are summed over ranks, not averaged.
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows SUM only; on NCCL it is the same sum
    return policy


def blocks(policy: TokenLogps) -> nn.ModuleList:
    """Find the transformer blocks, which every decoder of transformers keeps in `layers`."""
    layers = policy.model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)  # noqa: S101
    return layers
