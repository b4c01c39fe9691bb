"""One optimizer step of preference optimisation; the same code for one process and for FSDP2 over many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dpo_ray.config.objective import Objective
from dpo_ray.errors import TrainError
from dpo_ray.models.packed_rows import PackedRows
from dpo_ray.models.token_logps import sum_by_completion
from dpo_ray.objectives.preference import PairLogps
from dpo_ray.objectives.select import pair_losses

# The order in which `_measure` sums; weighted means of these are the metrics of a step.
ROUNDING = 1e-6  # relative error of a float32 sum of log-probs, with room for another engine's order of operations
MEASURES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def train_step(
    policy: nn.Module,
    micro_batches: Sequence[PackedRows],
    step_weight: float,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
) -> dict[str, float]:
    """Update the policy once: sum over pairs of weight * loss / step_weight, its gradient, a clipped optimizer step.

    `step_weight` is the weight of all pairs of the global step, over all ranks and micro-batches, so neither packing nor
    the number of ranks changes the loss. Collective: every rank calls it with the same number of micro-batches.

    Returns:
        Means over the global step's pairs under TRL's names, and `grad_norm` before clipping.

    Raises:
        TrainError: the loss or the gradient is not finite. The optimizer has not stepped: the state is that before.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(MEASURES), dtype=torch.float64)
    for i, rows in enumerate(micro_batches):
        _reduce_gradients_after(policy, last=i == len(micro_batches) - 1)
        pairs = pair_logps(policy(rows), rows)
        losses = pair_losses(objective, pairs)  # [pairs]
        loss = (rows.pair_weight * losses).sum() / step_weight
        loss.backward()
        sums += _measure(objective.beta, pairs, losses, rows)
    means = _over_ranks(sums) / step_weight
    grad_norm = _clip_gradients(policy, max_grad_norm)
    if not (means.isfinite().all() and grad_norm.isfinite()):
        raise TrainError(f"the loss ({means[0]:.6g}) or the gradient norm ({grad_norm:.6g}) is not finite")
    optimizer.step()
    return {**dict(zip(MEASURES, means.tolist(), strict=True)), "grad_norm": float(grad_norm)}


@torch.no_grad()
def evaluate_pairs(policy: nn.Module, rows: PackedRows, objective: Objective) -> tuple[PairLogps, Tensor]:
    """Score the pairs of a micro-batch without gradients: their log-probs, and their losses [pairs]."""
    pairs = pair_logps(policy(rows), rows)
    return pairs, pair_losses(objective, pairs)


def pair_logps(token_logps: Tensor, rows: PackedRows) -> PairLogps:
    """Sum token log-probs [rows] over completions and pick each pair's chosen and rejected one."""
    policy = sum_by_completion(token_logps, rows)  # [completions]
    reference = sum_by_completion(rows.reference_token_logps, rows)
    return PairLogps(
        policy_chosen=policy[rows.chosen],
        policy_rejected=policy[rows.rejected],
        reference_chosen=reference[rows.chosen],
        reference_rejected=reference[rows.rejected],
        chosen_tokens=rows.lengths[rows.chosen].float(),
        rejected_tokens=rows.lengths[rows.rejected].float(),
        preference_probability=rows.preference_probability,
    )


def accurate(pairs: PairLogps) -> Tensor:
    """Say for which pairs the implicit reward prefers chosen: bool [pairs]. A tie within float32 rounding is no success.

    Without that allowance the accuracy of an untrained policy would be rounding noise instead of 0.
    """
    sizes = (
        pairs.policy_chosen.abs()
        + pairs.policy_rejected.abs()
        + pairs.reference_chosen.abs()
        + pairs.reference_rejected.abs()
    )
    return pairs.chosen_logratio - pairs.rejected_logratio > ROUNDING * sizes


def _measure(beta: float, pairs: PairLogps, losses: Tensor, rows: PackedRows) -> Tensor:
    """Sum the measures over this micro-batch's pairs, by weight: float64 [measures] on the CPU."""
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    per_pair = torch.stack(
        [
            losses,
            chosen,
            rejected,
            chosen - rejected,
            accurate(pairs).float(),
            pairs.policy_chosen,
            pairs.policy_rejected,
        ]
    ).detach()
    counted = rows.pair_weight > 0  # fillers may hold anything
    return (per_pair[:, counted].double() * rows.pair_weight[counted].double()).sum(dim=1).cpu()


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
    return sums.cpu()


def _reduce_gradients_after(policy: nn.Module, *, last: bool) -> None:
    """Reduce gradients over ranks once a step, after the last micro-batch."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(last)
        policy.set_is_last_backward(last)


def _clip_gradients(policy: nn.Module, max_norm: float | None) -> Tensor:
    """Scale gradients down to `max_norm` over all shards; return the norm before (float32 scalar)."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm if max_norm is not None else float("inf"))
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach().float().cpu()  # type: ignore[attr-defined]
