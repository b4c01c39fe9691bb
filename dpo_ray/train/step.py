"""One optimizer step of preference optimisation; the same code runs in a single process and on all ranks of FSDP2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dpo_ray.config.objective import is_step_wide
from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import TrainError
from dpo_ray.models.packed_rows import PackedRows
from dpo_ray.models.token_logps import TokenScores
from dpo_ray.objectives.select import step_loss
from dpo_ray.objectives.step_logps import StepLogps, joined, step_logps, weight_sums

from .gradients import clip_gradients
from .measures import empty, figures, measure, totals_of


def train_step(
    policy: nn.Module,
    micro_batches: Sequence[PackedRows],
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    sources: Sequence[str] = (),
    *,
    with_statistics: bool = False,
) -> dict[str, float]:
    """Update the policy once: compute the step's loss and gradient, clip the gradient, run the optimizer.

    The loss is divided by the total weight of the step over all ranks and micro-batches. So it depends neither on how
    groups are packed nor on the number of ranks. Collective: all ranks must call this, with equally many micro-batches.

    Args:
        micro_batches: the micro-batches of this rank.
        sources: names of the data sources; the accuracy of each source is measured.
        with_statistics: also measure the entropy.

    Returns:
        Means over the step on all ranks, under TRL's names; and the gradient norm before clipping, as `grad_norm` and
        for each part of the model as `grad_norm/PART`.

    Raises:
        TrainError: the loss or the gradient is not finite. The weights and the optimizer state are unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = empty(len(sources))
    for i, (loss, measured, _) in enumerate(losses(policy, micro_batches, config, len(sources), with_statistics)):
        _reduce_gradients_after(policy, last=i == len(micro_batches) - 1)
        loss.backward()
        sums += measured
    means = figures(over_ranks(sums), sources)
    norm, by_group = clip_gradients(policy, config.optimizer.max_grad_norm)
    if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
        raise TrainError(f"the loss ({means['loss']:.6g}) or the gradient norm ({norm:.6g}) is not finite")
    optimizer.step()
    return {**means, "grad_norm": norm, **by_group}


def losses(
    policy: nn.Module, micro_batches: Sequence[PackedRows], config: TrainConfig, sources: int, with_statistics: bool
) -> Iterator[tuple[Tensor, Tensor, StepLogps]]:
    """Yield for each micro-batch its contribution to the step's loss, its measures, and its log-probs.

    The caller runs the backward pass. If the loss of one pair depends on other pairs of the step, the log-probs of the
    whole step are gathered. The gathered log-probs of other micro-batches and ranks have no gradient. So the gradients
    of all micro-batches add up to the gradient of the step's loss. Collective: all ranks must call this.
    """
    totals = totals_of(over_ranks(torch.stack([weight_sums(rows).cpu() for rows in micro_batches]).sum(dim=0)))
    statistics = with_statistics or config.shaping.wpo
    wide, known = is_step_wide(config.objective), None
    if wide and len(micro_batches) > 1:
        with torch.no_grad():
            known = _gathered(
                [step_logps(policy(rows, statistics), rows, config.shaping, totals) for rows in micro_batches]
            )
    for i, rows in enumerate(micro_batches):
        scores: TokenScores = policy(rows, statistics)
        own = step_logps(scores, rows, config.shaping, totals)
        if wide:
            known = known or _gathered([own])
            loss = step_loss(config.objective, _with_own(known, own, i, len(micro_batches)), totals)
            share = loss / len(known)  # every micro-batch has the same loss; the shares add up in the measures
        else:
            loss = share = step_loss(config.objective, own, totals)
        if scores.router_loss is not None:
            balance = config.router_aux_loss * scores.router_loss * (rows.tokens / totals.tokens)
            loss, share = loss + balance, share + balance
        yield loss, measure(config.objective, share, own, scores, rows, sources), own


def _gathered(own: Sequence[StepLogps]) -> list[StepLogps]:
    """Gather the log-probs of all ranks, in the order of the ranks. The result carries no gradients."""
    parts = [logps.detached("cpu") for logps in own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks: list[list[StepLogps]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, parts)
        parts = [logps for rank in ranks for logps in rank]
    return [logps.detached(own[0].policy.device) for logps in parts]


def _with_own(known: Sequence[StepLogps], own: StepLogps, i: int, micro_batches: int) -> StepLogps:
    """Join the log-probs of the whole step, with gradients only for micro-batch `i` of this rank."""
    at = i + micro_batches * (dist.get_rank() if dist.is_initialized() else 0)
    return joined([*known[:at], own, *known[at + 1 :]])


def over_ranks(sums: Tensor) -> Tensor:
    """Sum a CPU tensor over all ranks. Collective: all ranks must call this."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.to("cuda" if "nccl" in dist.get_backend() else "cpu")
        dist.all_reduce(sums)
    return sums.cpu()


def _reduce_gradients_after(policy: nn.Module, *, last: bool) -> None:
    """Configure FSDP to sum gradients over the ranks only after the last micro-batch of a step."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(last)
        policy.set_is_last_backward(last)
