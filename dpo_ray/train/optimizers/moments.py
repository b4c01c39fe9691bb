"""The optimizer's moments in whole: what a training hands to the next one, which may have another number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
SCATTERED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, ignore_frozen_params=True)
SEPARATOR = "//"  # no name of a parameter holds it


def gather_moments(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gather the state of every parameter, as `PARAMETER//STATE`, on rank 0; empty elsewhere; collective."""
    state: Any = get_optimizer_state_dict(policy, optimizer, options=GATHERED).get("state", {})
    return {
        f"{name}{SEPARATOR}{kind}": torch.as_tensor(value).contiguous()
        for name, own in state.items()
        for kind, value in own.items()
    }


def scatter_moments(policy: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Give the optimizer, which has not stepped, moments as `gather_moments` made them; collective.

    Args:
        moments: on rank 0; other ranks' are not looked at.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in moments.items():
        parameter, kind = name.split(SEPARATOR)
        state.setdefault(parameter, {})[kind] = value
    now: Any = get_optimizer_state_dict(policy, optimizer, options=GATHERED)
    whole = {"state": state, "param_groups": now.get("param_groups", [])}
    set_optimizer_state_dict(policy, optimizer, whole, options=SCATTERED)
