"""FSDP2: shard the policy over the ranks, block by block; what is done to each block before."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # makes torch_attn's operations
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dpo_ray.config.train import ShardingConfig

from .nf4 import nf4_weights
from .token_logps import TokenLogps

logger = logging.getLogger(__name__)

# Results that `selective` keeps: they cost most to make again. The rest of a block is cheap.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._grouped_mm.default,  # of experts
}


def prepare_blocks(policy: TokenLogps, checkpointing: Literal["none", "selective", "full"], *, compiled: bool) -> None:
    """Have each block recompute its activations in the backward pass, and compile it, before it is sharded."""
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
    """Shard each block and the root; float32 master weights and reductions, `compute_dtype` in forward.

    `hybrid` shards over `shard_workers` neighbouring ranks and replicates between such sets. While ranks are missing, so that
    they make no whole sets, it shards over all of them.
    Source: https://docs.pytorch.org/docs/2.13/distributed.fsdp.fully_shard.html
    """
    config = config or ShardingConfig()
    if config.shard_workers is not None and world_size % config.shard_workers:
        logger.warning("%d workers make no whole sets of %d: sharded over all", world_size, config.shard_workers)
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
