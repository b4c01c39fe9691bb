"""Shards the policy over the ranks with FSDP2, and prepares each transformer block of the policy for training."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # registers the operations of torch_attn
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dpo_ray.config.train import ShardingConfig

from .nf4 import nf4_weights
from .token_logps import TokenLogps

logger = logging.getLogger(__name__)

# Results that `selective` keeps because recomputing them is expensive. The rest of a block is cheap.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._grouped_mm.default,  # mixtures of experts
}


def prepare_blocks(policy: TokenLogps, checkpointing: Literal["none", "selective", "full"], *, compiled: bool) -> None:
    """Set up activation checkpointing and compilation of each transformer block. Call this before sharding."""
    layers = blocks(policy)
    for i, block in enumerate(layers):
        if checkpointing == "full":
            block = checkpoint_wrapper(block)
        elif checkpointing == "selective":
            block = checkpoint_wrapper(block, context_fn=partial(create_selective_checkpoint_contexts, _keep))
        if compiled:
            block.compile()
        layers[i] = block


def _keep(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def shard(
    policy: TokenLogps,
    device_type: str,
    world_size: int,
    compute_dtype: torch.dtype,
    config: ShardingConfig | None = None,
) -> TokenLogps:
    """Shard each transformer block and the root module over the ranks.

    Master weights and reductions are in float32, forward passes in `compute_dtype`.
    If `shard_workers` is n, each group of n neighbouring ranks holds one copy of the model, which is sharded over the group. If
    the number of ranks is not divisible by n, because some ranks are missing, weights are sharded over all ranks.
    Source: https://docs.pytorch.org/docs/2.13/distributed.fsdp.fully_shard.html
    """
    config = config or ShardingConfig()
    if config.shard_workers is not None and world_size % config.shard_workers:
        logger.warning(
            "%d workers are not divisible by shard_workers=%d: weights are sharded over all",
            world_size,
            config.shard_workers,
        )
        mesh = init_device_mesh(device_type, (world_size,))
    elif config.shard_workers is not None:
        shape = (world_size // config.shard_workers, config.shard_workers)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device_type, (world_size,))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device_type == "cuda") if config.cpu_offload else OffloadPolicy()
    whole = nf4_weights(policy)
    for block in blocks(policy):
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload, ignored_params=whole)
    root = fully_shard(policy, mesh=mesh, mp_policy=precision, offload_policy=offload, ignored_params=whole)
    assert isinstance(root, FSDPModule)  # noqa: S101 - fully_shard's return type is wider
    # The loss is already divided by the weight of the whole step: gradients are summed over ranks, not averaged.
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports SUM only; on NCCL it is the same sum
    return policy


def blocks(policy: TokenLogps) -> nn.ModuleList:
    """Return the transformer blocks of the model: the attribute `layers`, which every decoder in transformers has."""
    layers = policy.model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)  # noqa: S101
    return layers
