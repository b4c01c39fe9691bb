"""Options that change log-probs or weights before any loss: f-divergences, LD-DPO (length desensitisation), and WPO."""

from __future__ import annotations

from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config.shaping import AlphaDivergence, Divergence, ForwardKl, JsDivergence, ReverseKl

LARGEST_EXPONENT = 80.0  # safe for exp in float32, with room for sums


def divergence_score(logratio: Tensor, divergence: Divergence) -> Tensor:
    """Compute f'(pi / pi_ref) of an f-divergence, up to a constant: Wang et al. 2023 (2309.16240), table 1."""
    match divergence:
        case ReverseKl():
            return logratio
        case ForwardKl():
            return -_exp(-logratio)
        case JsDivergence():
            return F.logsigmoid(logratio)
        case AlphaDivergence(alpha=alpha):
            return _exp((alpha - 1) * logratio) / (alpha - 1)
        case _:
            assert_never(divergence)


def _exp(x: Tensor) -> Tensor:
    return x.clamp(max=LARGEST_EXPONENT).exp()


def desensitised(
    token_logps: Tensor,  # [rows], all completions concatenated
    lengths: Tensor,  # int64 [completions]
    own: Tensor,  # int64 [pairs]: the completion whose log-probs are summed
    other: Tensor,  # int64 [pairs]: the other completion of the pair
    alpha: float,
) -> Tensor:
    """Sum the token log-probs of one completion of each pair: float32 [pairs].

    Tokens beyond the length of the pair's other completion are weighted by `alpha`. This is LD-DPO: Liu et al. 2024
    (2409.06411), eq. 10. Sums are in float64, as in `sum_by_completion`.
    """
    sums = F.pad(token_logps.double().cumsum(0), (1, 0))  # [rows + 1]
    stop = lengths.cumsum(0)
    start = (stop - lengths)[own]
    public = start + torch.minimum(lengths[own], lengths[other])
    inside = sums[public] - sums[start]
    return (inside + alpha * (sums[stop[own]] - sums[public])).float()


def policy_weight(
    token_logps: Tensor,  # [rows]
    log_collision: Tensor,  # [rows]: log of the sum over the vocabulary of p^2
    completion_of_row: Tensor,  # int64 [rows]
    lengths: Tensor,  # int64 [completions]
) -> Tensor:
    """Compute WPO's weight of each completion: float32 [completions], without gradient.

    The weight is large if the policy itself is likely to write the completion. It is the exponential of the mean over tokens
    of log p(token) - log sum p^2: WPO with sampled alignment, Zhou et al. 2024 (2406.11827), eq. 4.
    """
    excess = (token_logps - log_collision).detach().double()
    total = torch.zeros(len(lengths), dtype=torch.float64, device=excess.device)
    return (total.index_add(0, completion_of_row, excess) / lengths).exp().float()
