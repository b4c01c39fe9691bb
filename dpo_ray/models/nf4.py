"""Stores frozen weights in 4 bits (NF4), below trainable adapters: QLoRA, with the kernels of bitsandbytes.

The linear layers of all transformer blocks store half a byte for each weight, and one scale for every 64 weights; the scales
are quantized, too. The 4-bit weights are not sharded. Each rank holds all of them, because they are smaller than the weights
that FSDP2 would gather.
Source: Dettmers et al. 2023 (2305.14314); https://huggingface.co/docs/bitsandbytes/reference/functional
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_A_BYTE = 2


class Nf4Linear(nn.Linear):
    """A linear layer with a frozen 4-bit weight. Each use dequantizes the weight, to the dtype of the input."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate the full weight
        self.in_features, self.out_features = like.in_features, like.out_features
        bytes_ = like.in_features * like.out_features // WEIGHTS_A_BYTE
        self.weight = nn.Parameter(torch.empty(bytes_, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = like.bias
        self._state: Any = None  # the scales of the weight

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Quantize a weight [out, in], and store the result on the same device. `whole` then returns it in `dtype`."""
        from bitsandbytes.functional import quantize_4bit

        packed, self._state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def whole(self) -> Tensor:
        """Dequantize the weight of this layer, and return it: [out, in]."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self._state)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return _Product.apply(x, self, self.bias)


class _Product(torch.autograd.Function):
    """Computes x W^T + b. The backward pass dequantizes the 4-bit weight again, so that the full weight need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.whole().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.whole().to(grad.dtype), None, None  # only adapters are trained


def quantize_blocks(layers: nn.ModuleList, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every linear layer of the blocks by a 4-bit layer.

    If a layer is on the meta device, `fill_shards` sets its weight later.
    """
    linear = [(name, m) for name, m in layers.named_modules() if type(m) is nn.Linear]
    for name, module in linear:
        parent, _, leaf = name.rpartition(".")
        small = Nf4Linear(module)
        if module.weight.device.type != "meta":
            small.hold(module.weight.detach().to(device), dtype)
        setattr(layers.get_submodule(parent), leaf, small)


def nf4_weights(module: nn.Module) -> set[nn.Parameter]:
    """Return the 4-bit weights of a module, which must not be sharded."""
    layers = (m for m in module.modules() if isinstance(m, Nf4Linear))
    return {p for layer in layers for name, p in layer.named_parameters(recurse=False) if name == "weight"}
