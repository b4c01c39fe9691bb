"""Held-out evaluation during training: the measures of a training step, and a table with one row per pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from dpo_ray.config.data import EVAL
from dpo_ray.config.train import TrainConfig
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.objectives.step_logps import StepLogps, weight_sums
from dpo_ray.schedule.files import RankStep

from .measures import accurate, empty, figures, pair_rewards, rewards
from .step import losses, over_ranks

# Columns of the held-out table: one row per pair. Unpaired data has one row per completion, with NaN on the other side.
HELDOUT = (
    "loss",  # of the step to which the pair belongs; the weighted mean over the steps is the loss of the set
    "reward_chosen",
    "reward_rejected",
    "accurate",
    "logp_chosen",
    "logp_rejected",
    "reference_chosen",
    "reference_rejected",
    "tokens_chosen",
    "tokens_rejected",
    "weight",
)

# Readers of the held-out splits by name: `eval`, or `eval_NAME` for a named set. The order is the same on all ranks.
Heldout = Mapping[str, Callable[[], Iterable[RankStep]]]


def evaluate(policy: TokenLogps, heldout: Heldout, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Measure the policy on all held-out sets. Collective: all ranks must call this.

    Metrics of all sets together have the prefix `eval_`. Metrics of a single named set have the prefix `eval_NAME_`.
    The loss of a set is the weighted mean of the losses of its steps.
    """
    return heldout_figures({name: heldout_sums(policy, read(), config, device)[0] for name, read in heldout.items()})


def heldout_figures(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute the metrics of each named set, and of all sets together, from the sums of each set (`heldout_sums`)."""
    if not sums:
        return {}
    means = _named(EVAL, torch.stack(list(sums.values())).sum(dim=0))
    for split in sorted(sums.keys() - {EVAL}):
        means |= _named(split, sums[split])
    return means


def _named(prefix: str, sums: Tensor) -> dict[str, float]:
    loss, steps = sums[0].tolist()
    return {f"{prefix}_{name}": value for name, value in (figures(sums, ()) | {"loss": loss / steps}).items()}


def heldout_sums(
    policy: TokenLogps, steps: Iterable[RankStep], config: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Measure the policy on one held-out set. Collective: all ranks must call this.

    Returns:
        First, the sums over all ranks and steps, in the form that `measures.measure` returns. The row of the loss
        contains the sum of (loss * weight) over all steps, and the sum of the weights. Second, this rank's rows of the
        held-out table: float64 [pairs, HELDOUT] on the CPU, without fillers (micro-batches of weight 0).
    """
    policy.eval()
    total, tables = empty(0), [torch.zeros(0, len(HELDOUT), dtype=torch.float64)]
    with torch.no_grad():
        for share in steps:
            micro_batches = [packed_rows(m, device, policy.layout) for m in share.micro_batches]
            sums, of_step = empty(0), []
            for _, measured, logps in losses(policy, micro_batches, config, 0, with_statistics=True):
                sums += measured
                of_step.append(table(config, logps))
            sums = over_ranks(sums)
            weight = over_ranks(torch.stack([weight_sums(rows).cpu() for rows in micro_batches]).sum(dim=0))[:3].max()
            pairs = torch.cat(of_step)
            tables.append(torch.cat([sums[0, 0].expand(len(pairs), 1), pairs], dim=1))
            sums[0] = torch.stack([sums[0, 0] * weight, weight])
            total += sums
    policy.train()
    return total, torch.cat(tables)


def table(config: TrainConfig, logps: StepLogps) -> Tensor:
    """Build the rows of a micro-batch for the table of held-out results, without the column `loss`.

    Returns:
        float64 [rows, columns] on the CPU; the columns are those that `HELDOUT` names, except `loss`. There is one row per
        pair; or, if there are no pairs, one row per labelled completion. Rows of weight 0 are left out.
    """
    p = logps.pairs
    if len(logps.pair_weight):
        chosen, rejected = pair_rewards(config.objective, logps)
        columns = (
            chosen,
            rejected,
            accurate(config.objective, logps),
            p.policy_chosen,
            p.policy_rejected,
            p.reference_chosen,
            p.reference_rejected,
            p.chosen_tokens,
            p.rejected_tokens,
            logps.pair_weight,
        )
    else:
        missing = torch.full_like(logps.policy, float("nan"))
        sides = [
            torch.where(logps.label == sign, values, missing)
            for values in (rewards(config.objective, logps), logps.policy, logps.reference, logps.lengths)
            for sign in (1, -1)
        ]
        columns = (*sides[:2], missing, *sides[2:], logps.weight * logps.label.abs())
    rows_of_table = torch.stack([c.double() for c in columns], dim=1).cpu()
    return rows_of_table[rows_of_table[:, -1] > 0]
