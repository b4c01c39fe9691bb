"""Frozen weights in 4 bits (NF4), under adapters that are trained: QLoRA, by bitsandbytes' kernels.

The linear layers of all blocks keep half a byte a weight, and a scale of its own every 64 of them, which is quantized too. Each
rank holds all of these, not a shard: at half a byte they are smaller than what FSDP2 would gather.
Source: Dettmers et al. 2023 (2305.14314); https://huggingface.co/docs/bitsandbytes/reference/functional
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_A_BYTE = 2


class Nf4Linear(nn.Linear):
    """A linear layer with a frozen weight in 4 bits, multiplied out for each use in the type of the input."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight in full
        self.in_features, self.out_features = like.in_features, like.out_features
        bytes_ = like.in_features * like.out_features // WEIGHTS_A_BYTE
        self.weight = nn.Parameter(torch.empty(bytes_, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = like.bias
        self._state: Any = None  # scales

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Quantize a weight [out, in] and keep it where it is; `dtype` is that of what it is multiplied out to."""
        from bitsandbytes.functional import quantize_4bit

        packed, self._state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def whole(self) -> Tensor:
        """Multiply the weight out: [out, in]."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self._state)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return _Product.apply(x, self, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b, which keeps the 4 bits for the backward pass and multiplies them out again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.whole().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.whole().to(grad.dtype), None, None  # nothing but adapters is trained


def quantize_blocks(layers: nn.ModuleList, dtype: torch.dtype, device: torch.device) -> None:
    """Give every linear layer of the blocks 4 bits a weight; of a model without memory (meta), room for them."""
    linear = [(name, m) for name, m in layers.named_modules() if type(m) is nn.Linear]
    for name, module in linear:
        parent, _, leaf = name.rpartition(".")
        small = Nf4Linear(module)
        if module.weight.device.type != "meta":
            small.hold(module.weight.detach().to(device), dtype)
        setattr(layers.get_submodule(parent), leaf, small)


def nf4_weights(module: nn.Module) -> set[nn.Parameter]:
    """List the weights that are not to be sharded."""
    layers = (m for m in module.modules() if isinstance(m, Nf4Linear))
    return {p for layer in layers for name, p in layer.named_parameters(recurse=False) if name == "weight"}
