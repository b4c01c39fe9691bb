"""Counts the work of a micro-batch, from which throughput is computed: tokens in each layout, and floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dpo_ray.schedule.micro_batch import MicroBatch

from .lora import is_lora
from .nf4 import WEIGHTS_A_BYTE

# Dense bf16 operations per second from the vendors' data sheets; the first key that a card's name contains is used.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine how many floating-point operations it needs."""

    frozen_weights: int  # frozen weights in the blocks that one token uses; of experts, only the chosen ones
    trained_weights: int  # the same for trainable weights
    head_weights: int  # vocabulary * hidden
    head_is_trained: bool
    attention_width: int  # heads * head dimension, summed over the blocks

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Compute the shape of a model, sharded or not, on any device."""
        config = model.config.get_text_config()
        layers, head = model.get_decoder().layers, model.get_output_embeddings()
        assert isinstance(layers, nn.ModuleList) and head is not None  # noqa: S101, PT018 - every decoder has both
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        chosen = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
        frozen = trained = 0.0
        for name, weight in layers.named_parameters():
            if weight.ndim < 2:
                continue
            numel = weight.numel() * (WEIGHTS_A_BYTE if weight.dtype == torch.uint8 else 1)
            met = numel * (chosen if ".experts." in name and not is_lora(name) else 1.0)
            frozen, trained = (frozen, trained + met) if weight.requires_grad else (frozen + met, trained)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * head_dim * len(layers)
        return cls(round(frozen), round(trained), head.weight.numel(), head.weight.requires_grad, width)

    def flops(self, prompt_tokens: int, completion_tokens: Sequence[int]) -> float:
        """Count the floating-point operations that the forward and the backward pass of a group need at least.

        Each token passes once through the blocks, with two operations per weight. Only completion tokens pass through the head.
        The operations of attention depend on the number of tokens that each token sees. The backward pass of trained weights
        costs twice the forward pass; that of frozen weights costs the same as the forward pass. Recomputation, padding and
        repeated prompts do not count, so a layout that computes more has a lower utilisation.
        Source: PaLM, 2204.02311, appendix B (model FLOPs utilisation).
        """
        rows = sum(completion_tokens)
        seen = prompt_tokens * (prompt_tokens + 1) / 2 + sum(
            n * prompt_tokens + n * (n + 1) / 2 for n in completion_tokens
        )
        blocks = (prompt_tokens + rows) * (4 * self.frozen_weights + 6 * self.trained_weights)
        head = rows * (6 if self.head_is_trained else 4) * self.head_weights
        return blocks + head + 12 * self.attention_width * seen


@dataclass(frozen=True)
class Work:
    """The work of a micro-batch. Fillers (groups of weight 0) do not count."""

    shared_tokens: int = 0  # tokens, if each prompt is computed once
    packed_tokens: int = 0  # tokens, if the prompt is repeated for every completion
    longest_tokens: int = 0  # tokens of the longest sequence, that is, a prompt with one of its completions
    sequences: int = 0  # number of completions
    flops: float = 0.0

    @classmethod
    def of(cls, batch: MicroBatch, shape: ModelShape) -> Work:
        """Count the work of a micro-batch."""
        width = int(batch.completion_index.max()) + 1
        cell = batch.group_index.astype(np.int64) * width + batch.completion_index
        tokens = np.bincount(cell, minlength=len(batch.weight) * width).reshape(
            -1, width
        )  # [groups, 1 + most completions]
        work = cls()
        for prompt, *rest in tokens[batch.weight > 0].tolist():
            completions = [n for n in rest if n]
            lengths = [prompt + n for n in completions]
            work += cls(
                prompt + sum(completions),
                sum(lengths),
                max(lengths, default=0),
                len(lengths),
                shape.flops(prompt, completions),
            )
        return work

    def __add__(self, other: Work) -> Work:
        """Add the work of other groups. No group may be in both."""
        return Work(
            self.shared_tokens + other.shared_tokens,
            self.packed_tokens + other.packed_tokens,
            max(self.longest_tokens, other.longest_tokens),
            self.sequences + other.sequences,
            self.flops + other.flops,
        )

    @property
    def padded_tokens(self) -> int:
        """Return the number of tokens if all sequences are padded to the longest one."""
        return self.longest_tokens * self.sequences


def peak_flops(device: torch.device) -> float | None:
    """Return the peak bf16 operations per second of a device; None for a CPU and for a GPU that is not in PEAK_FLOPS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)
