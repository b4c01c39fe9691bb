"""The full (unsharded) optimizer state. The training of one round passes it to the training of a later round.

The two may have different numbers of ranks.
"""

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
SEPARATOR = "//"  # does not occur in parameter names


def gather_moments(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gather the optimizer state of all parameters on rank 0, with keys `PARAMETER//STATE`. Other ranks return {}.

    Collective: all ranks must call this.
    """
    state: Any = get_optimizer_state_dict(policy, optimizer, options=GATHERED).get("state", {})
    return {
        f"{name}{SEPARATOR}{kind}": torch.as_tensor(value).contiguous()
        for name, own in state.items()
        for kind, value in own.items()
    }


def scatter_moments(policy: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Load the result of `gather_moments` into an optimizer that has not made a step yet.

    Collective: all ranks must call this.

    Args:
        moments: the state on rank 0, which sends it to all ranks; other ranks pass {}.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in moments.items():
        parameter, kind = name.split(SEPARATOR)
        state.setdefault(parameter, {})[kind] = value
    now: Any = get_optimizer_state_dict(policy, optimizer, options=GATHERED)
    whole = {"state": state, "param_groups": now.get("param_groups", [])}
    set_optimizer_state_dict(policy, optimizer, whole, options=SCATTERED)
