"""AdamW with 8-bit state, or with state that is paged between GPU and CPU, by the kernels of bitsandbytes.

The optimizers of bitsandbytes support plain tensors only. Here its kernels are called for each rank's shards, and the
state is sharded like the weights. So checkpoints are sharded too, and can be loaded with any number of ranks.
Source: Dettmers et al. 2021 (2110.02861); https://huggingface.co/docs/bitsandbytes/reference/functional
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from dpo_ray.config.train import OptimizerConfig
from dpo_ray.train.dtensor import own_part

BLOCK = 256  # number of values that share a scale in bitsandbytes' kernels
FEWEST_VALUES = 4096  # in a parameter with 8-bit state: for small ones precision matters more than memory
FEWEST_PAGED_VALUES = 100_000  # in a shard whose state is paged


class BlockwiseAdamW(torch.optim.Optimizer):
    """AdamW with 8-bit state (`bits=8`), with paged state (`paged`), or with state that is both.

    A parameter has 8-bit state only if it is a large matrix whose rows can be divided into full blocks of BLOCK values.
    Then no block crosses the border of two shards, so the result does not depend on the number of ranks. All other
    parameters have 32-bit state. On a CPU nothing is paged.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, *, bits: int, paged: bool) -> None:
        import bitsandbytes.functional as kernels

        super().__init__(groups, {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps})
        self._kernels, self._paged = kernels, paged
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for group in self.param_groups:  # built now, so that loading a checkpoint has tensors to fill
            for p in group["params"]:
                self.state[p] = self._new_state(p, bits)

    def _new_state(self, p: Tensor, bits: int) -> dict[str, Tensor]:
        row = math.prod(p.shape[1:])
        eight = bits == 8 and p.ndim > 1 and row % BLOCK == 0 and p.numel() >= FEWEST_VALUES
        shard = own_part(p)
        state = {"step": torch.zeros(())}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = _sharded_as(p, self._zeros(shard, torch.uint8 if eight else torch.float32), p.shape)
            if eight:
                scales = shard.new_zeros((len(shard), row // BLOCK), dtype=torch.float32)
                state[f"{moment}_scale"] = _sharded_as(p, scales, torch.Size((len(p), row // BLOCK)))
        return state

    def _zeros(self, shard: Tensor, dtype: torch.dtype) -> Tensor:
        if not self._paged or shard.device.type == "cpu" or shard.numel() < FEWEST_PAGED_VALUES:
            return torch.zeros_like(shard, dtype=dtype)
        pages = self._kernels.get_paged(*shard.shape, dtype=dtype, device=shard.device)
        self._kernels.fill(pages, 0)
        return pages

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient."""
        device = None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["step"] += 1
                shard, gradient = own_part(p), own_part(p.grad).contiguous()
                if shard.numel():
                    state = {name: own_part(value) for name, value in self.state[p].items()}
                    self._update(shard, gradient, state, group)
                    device = shard.device
        if self._paged and device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)  # pages are moved asynchronously

    def _update(self, shard: Tensor, gradient: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
        first, second = state["exp_avg"], state["exp_avg_sq"]
        for moment in (first, second):
            if getattr(moment, "is_paged", False):
                self._kernels.prefetch_tensor(moment)
        (beta1, beta2), step = group["betas"], int(state["step"])
        rate, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
        if first.dtype == torch.float32:
            self._kernels.optimizer_update_32bit(
                "adam", gradient, shard, first, beta1, eps, step, rate, second, beta2, weight_decay=decay
            )
            return
        scales = (state["exp_avg_scale"].view(-1), state["exp_avg_sq_scale"].view(-1))
        self._kernels.optimizer_update_8bit_blockwise(
            *("adam", gradient, shard, first, second, beta1, beta2, 0.0, 0.0, eps, step, rate),
            *(*self._maps_on(shard.device), *scales),
            weight_decay=decay,
        )

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return two quantization maps: a signed one for the first moment, an unsigned one for the second moment."""
        if device not in self._maps:
            signed, unsigned = (self._kernels.create_dynamic_map(signed=s).to(device) for s in (True, False))
            self._maps[device] = signed, unsigned
        return self._maps[device]

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy the loaded values into the existing state.

        torch's own method is not used: it would convert the 8-bit values, and replace paged memory by ordinary memory.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, name in zip(group["params"], saved["params"], strict=True):  # an index; in checkpoints a name
                for what, value in state_dict["state"].get(name, {}).items():
                    if (own := self.state[p][what]) is not value:
                        own_part(own).copy_(own_part(value))
            group.update({name: value for name, value in saved.items() if name != "params"})


def _sharded_as(p: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    """Build a DTensor of the full shape `shape` from this rank's shard `local`. It is sharded like `p`.

    If `p` is a plain tensor, `local` is returned unchanged. `DTensor.from_local` is not used because it would move
    offloaded shards from the CPU to the GPU.
    """
    if not isinstance(p, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(p.device_mesh, p.placements, tensor_meta=TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)
