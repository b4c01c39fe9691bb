"""Losses that need all pairs of a step at once, and losses of single completions and of rankings. All are pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ray.config.objective import AotObjective, AotUnpairedObjective, KtoObjective, ListwiseObjective

from .pairs import PairLogps, smoothed
from .step_logps import StepLogps


def aot(pairs: PairLogps, o: AotObjective) -> Tensor:
    """Compute AOT over all pairs of the step: float32 [pairs].

    The policy's log-ratios of chosen to rejected are sorted, and also the reference model's. The loss compares the values
    at the same positions of both lists. Melnyk et al. 2024 (2406.05882), eq. 9, as in TRL.
    """
    policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values
    reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
    return smoothed(o.beta * (policy - reference), 1.0, o.label_smoothing)


def aot_unpaired(pairs: PairLogps, o: AotUnpairedObjective) -> Tensor:
    """Compute unpaired AOT over all pairs of the step: float32 [pairs].

    The log-ratios of policy to reference of all chosen completions are sorted, and so are those of all rejected completions.
    The loss compares the values at the same positions of both lists. Melnyk et al. 2024 (2406.05882), eq. 6, as in TRL.
    """
    chosen, rejected = pairs.chosen_logratio.sort().values, pairs.rejected_logratio.sort().values
    return smoothed(o.beta * (chosen - rejected), 1.0, o.label_smoothing)


def kl_estimate(logratio: Tensor, weight: Tensor, is_mismatched: Tensor) -> Tensor:
    """Estimate KTO's KL term z0: the weighted mean log-ratio of mismatched completions, or 0 if the mean is negative.

    A mismatched completion belongs to another prompt. The estimate has no gradient.

    Args:
        logratio: float32 [completions].
        weight: float32 [completions].
        is_mismatched: bool [completions].
    """
    counted = weight * is_mismatched
    mean = (counted.double() * logratio.detach().double()).sum() / counted.double().sum().clamp(min=1e-12)
    return mean.clamp(min=0).float()


def kto(logratio: Tensor, label: Tensor, z0: Tensor, o: KtoObjective) -> Tensor:
    """Compute KTO: float32 [completions], 0 for completions without a label. Ethayarajh et al. 2024 (2402.01306), eq. 8.

    Args:
        logratio: float32 [completions].
        label: float32 [completions]; 1 desirable, -1 undesirable, 0 neither.
        z0: the KL term, as estimated by `kl_estimate`.
    """
    value = 1 - (o.beta * label * (logratio - z0)).sigmoid()
    weight = torch.where(label > 0, o.desirable_weight, o.undesirable_weight) * label.abs()
    return weight * value


def listwise(logratio: Tensor, scores: Tensor, group: Tensor, o: ListwiseObjective) -> Tensor:
    """Compute the Plackett-Luce loss of rankings: float32 [completions]. The sum over a group is the loss of its ranking.

    The loss is the negative log-likelihood of the ranking. Each completion competes with the completions of its group that
    are ranked below it. Rafailov et al. 2023 (2305.18290), eq. 18.

    Args:
        logratio: float32 [completions].
        scores: float32 [completions]; a completion with the score NaN is in no ranking.
        group: int64 [completions].
    """
    reward = o.beta * logratio
    below = (group[:, None] == group[None, :]) & (scores[None, :] < scores[:, None])  # [completions, completions]
    competes = below | torch.eye(len(reward), dtype=torch.bool, device=reward.device)
    against = torch.where(competes, reward[None, :], float("-inf"))
    return against.logsumexp(dim=1) - reward


def step_kto(logps: StepLogps, o: KtoObjective) -> Tensor:
    """Compute KTO for the completions of a whole step, with z0 estimated from this step: float32 [completions]."""
    z0 = kl_estimate(logps.logratio, logps.weight, logps.is_mismatched)
    return kto(logps.logratio, logps.label, z0, o)


def step_listwise(logps: StepLogps, o: ListwiseObjective) -> Tensor:
    """Compute the ranking loss for the completions in `logps`: float32 [completions]."""
    return listwise(logps.logratio, logps.scores, logps.group, o)


LOSSES = {
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "kto": step_kto,
    "listwise": step_listwise,
}
