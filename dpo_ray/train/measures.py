"""The measures of a step. Each measure is a sum and a weight, so that the measures of all ranks can be added up.

The value of a measure is its sum divided by its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_ray.config.objective import Objective, is_per_token, reward_beta, uses_reference
from dpo_ray.models.packed_rows import PackedRows
from dpo_ray.models.token_logps import TokenScores
from dpo_ray.objectives.step_logps import StepLogps, Totals

ROUNDING = 1e-6  # relative error of a float32 sum of log-probs, with a margin for another engine's order of operations

# TRL's names. A measure without weight in a step (for example accuracies of unpaired data) is omitted from its figures.
MEASURES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logratio",  # policy against reference, nats per completion
    "reference_drift",  # absolute log-ratio, nats per token
    "kl",  # KTO's estimate, before clamping at 0
    "entropy",  # nats per token
)

EVALUATED = (*MEASURES, "length_bias")
"""The measures of each held-out set in an evaluation."""


def rewards(objective: Objective, logps: StepLogps) -> Tensor:
    """Compute the implicit reward of every completion: float32 [completions].

    The reward is beta * (policy log-prob - reference log-prob). If the objective uses no reference, the reward is
    beta * policy log-prob. This log-prob is the mean over the tokens if the loss uses the mean, and the sum otherwise.
    """
    beta = reward_beta(objective)
    if uses_reference(objective):
        return beta * logps.logratio
    return beta * (logps.policy / logps.lengths if is_per_token(objective) else logps.policy)


def pair_rewards(objective: Objective, logps: StepLogps) -> tuple[Tensor, Tensor]:
    """Compute the implicit rewards of the chosen and the rejected completions: float32 [pairs] each."""
    beta, p = reward_beta(objective), logps.pairs
    if uses_reference(objective):
        return beta * p.chosen_logratio, beta * p.rejected_logratio
    if is_per_token(objective):
        return beta * p.policy_chosen / p.chosen_tokens, beta * p.policy_rejected / p.rejected_tokens
    return beta * p.policy_chosen, beta * p.policy_rejected


def accurate(objective: Objective, logps: StepLogps) -> Tensor:
    """Return for each pair whether the chosen completion has the higher implicit reward: bool [pairs].

    The rewards must differ by more than float32 rounding. Without that tolerance the accuracy of an untrained policy
    would be rounding noise instead of 0.
    """
    p = logps.pairs
    sides = [p.policy_chosen, p.policy_rejected]
    if uses_reference(objective):
        sides += [p.reference_chosen, p.reference_rejected]
    chosen, rejected = pair_rewards(objective, logps)
    size = torch.stack([side.abs() for side in sides]).sum(dim=0)
    if not uses_reference(objective) and is_per_token(objective):
        size = p.policy_chosen.abs() / p.chosen_tokens + p.policy_rejected.abs() / p.rejected_tokens
    return chosen - rejected > ROUNDING * reward_beta(objective) * size


@torch.no_grad()
def measure(
    objective: Objective, loss: Tensor, logps: StepLogps, scores: TokenScores, rows: PackedRows, sources: int
) -> Tensor:
    """Compute a micro-batch's contribution to the step's measures: float64 [measures + sources + 3, 2] on the CPU.

    Each row is a sum and a weight. The first rows are those of MEASURES, the next ones the accuracies of the data
    sources. The last three rows hold the six moments from which `figures` computes the correlation `length_bias`.

    Args:
        loss: this micro-batch's contribution to the step's loss.
        sources: number of data sources.
    """
    pair_weight, weight = rows.pair_weight.double(), rows.completion_weight.double()
    chosen, rejected = (side.double() for side in pair_rewards(objective, logps))
    hits = accurate(objective, logps).double()
    paired = bool(len(pair_weight))
    unit = loss.new_ones((), dtype=torch.float64)

    def mean(values: Tensor, by: Tensor) -> Tensor:
        counted = by > 0  # fillers may hold anything
        return torch.stack([(values[counted].double() * by[counted]).sum(), by[counted].sum()])

    def by_label(values: Tensor, sign: int) -> Tensor:
        return mean(values, weight * (logps.label == sign))

    if paired:
        sides = [mean(chosen, pair_weight), mean(rejected, pair_weight)]
        logp_sides = [mean(logps.pairs.policy_chosen, pair_weight), mean(logps.pairs.policy_rejected, pair_weight)]
    else:
        reward = rewards(objective, logps)
        sides = [by_label(reward, 1), by_label(reward, -1)]
        logp_sides = [by_label(logps.policy, 1), by_label(logps.policy, -1)]
    own = weight * ~logps.is_mismatched
    token_weight = own[rows.completion_of_row]
    has_reference = float(uses_reference(objective))
    drift = (scores.logps - rows.reference_token_logps).abs()
    nothing = unit.new_zeros(2)
    figures = [
        torch.stack([loss.double(), 0 * unit]),
        *sides,
        mean(chosen - rejected, pair_weight),
        mean(hits, pair_weight),
        *logp_sides,
        mean(logps.logratio, own * has_reference),
        mean(drift, token_weight * has_reference),
        mean(logps.logratio, weight * logps.is_mismatched * has_reference),
        mean(scores.entropy, token_weight) if scores.entropy is not None else nothing,
        *(mean(hits, pair_weight * (rows.pair_source == source)) for source in range(sources)),
    ]
    x, y = chosen - rejected, logps.pairs.chosen_tokens.double() - logps.pairs.rejected_tokens.double()
    moments = [(pair_weight * v)[pair_weight > 0].sum() for v in (torch.ones_like(x), x, y, x * x, y * y, x * y)]
    return torch.cat([torch.stack(figures), torch.stack(moments).reshape(3, 2)]).cpu()


def figures(sums: Tensor, sources: Sequence[str]) -> dict[str, float]:
    """Convert a step's sums [measures + sources + 3, 2] into means by name. Measures of weight 0 are omitted.

    `length_bias` is the correlation, over pairs, of the reward margin with the difference in length (in tokens).
    """
    names = [*MEASURES, *(f"rewards/accuracies/{source}" for source in sources)]
    values, moments = sums[: len(names)].tolist(), sums[len(names) :].flatten().tolist()
    means = {name: total / weight for name, (total, weight) in zip(names, values, strict=True) if weight > 0}
    means = {"loss": values[0][0]} | means
    if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]  # for unpaired data, as in TRL
    w, sx, sy, sxx, syy, sxy = moments
    if w > 0:
        spread = (w * sxx - sx * sx) * (w * syy - sy * sy)
        means["length_bias"] = (
            (w * sxy - sx * sy) / math.sqrt(spread) if spread > 1e-12 * (1 + sxx * syy) * w * w else 0.0
        )
    return means


def empty(sources: int) -> Tensor:
    """Return sums of zero, to which the sums of micro-batches are added: float64 [measures + sources + 3, 2]."""
    return torch.zeros(len(MEASURES) + sources + 3, 2, dtype=torch.float64)


def totals_of(sums: Tensor) -> Totals:
    """Build the totals of a step from `sums`: float64 [5], the weights summed over all ranks and micro-batches."""
    return Totals.of(sums.tolist())
