"""Builds the policy on each rank: loads the model, adds adapters, and shards it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from dpo_ray.config.train import TrainConfig

from .load import as_policy, load_policy
from .lora import add_lora
from .nf4 import quantize_blocks
from .sharding import blocks, prepare_blocks, shard
from .sliced_weights import WholeModelNeededError, fill_adapter, fill_shards, find_slices
from .token_logps import TokenLogps

logger = logging.getLogger(__name__)


def build_policy(
    directory: Path,
    adapter: Path | None,
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    trained_adapter: Path | None = None,
) -> TokenLogps:
    """Build the policy, sharded over the ranks of the process group. All ranks must call this function together.

    Each rank reads only its own rows of the weights from the files. If the files store the weights in another form than
    the model, each rank first loads the whole model into CPU memory, and logs this. Quantized weights are not sharded.

    Args:
        adapter: directory of a LoRA adapter to merge into the model before training.
        dtype: dtype of the forward pass; master weights are float32.
        seed: seed for the initial values of the adapter that `config.lora` trains.
        trained_adapter: directory of a trained adapter whose training continues; None: training starts with a new
            adapter.

    Raises:
        ConfigError: raised on all ranks, for the same reasons as by `load_policy` and `add_lora`.
    """
    weights = None
    try:
        weights = find_slices(directory, adapter)
        policy = as_policy(weights.model, config.logprob_chunk_tokens, config.layout, f"model.path={directory}")
    except WholeModelNeededError as reason:
        logger.info("each rank loads the whole model before it is sharded: %s", reason)
        policy = load_policy(directory, torch.float32, config.logprob_chunk_tokens, adapter, config.layout)
    if config.quantization is not None:
        quantize_blocks(blocks(policy), dtype, device)
    if config.lora is not None:
        add_lora(policy.model, config.lora, seed)
    prepare_blocks(policy, config.activation_checkpointing, compiled=config.compile)
    # The model is never moved to the device as a whole: sharding moves it block by block.
    shard(policy, device.type, dist.get_world_size(), dtype, config.sharding)
    if weights is not None:
        place = torch.device("cpu") if config.sharding.cpu_offload else device
        read = fill_shards(policy, weights, place, dtype, seed)
        logger.info("read %.3f GiB of weights", read / 2**30)
    if trained_adapter is not None:
        fill_adapter(policy, trained_adapter)
    return policy
