"""Losses over a whole step, over single completions, or over rankings. Pure functions on flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ray.config.objective import AotObjective, AotUnpairedObjective, KtoObjective, ListwiseObjective

from .pairs import PairLogps, smoothed
from .step_logps import StepLogps


def aot(pairs: PairLogps, o: AotObjective) -> Tensor:
    """Compute AOT: sorted log-ratios of policy against those of reference, over all pairs of the step: float32 [pairs].

    Melnyk et al. 2024 (2406.05882), eq. 9, as in TRL.
    """
    policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values
    reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
    return smoothed(o.beta * (policy - reference), 1.0, o.label_smoothing)


def aot_unpaired(pairs: PairLogps, o: AotUnpairedObjective) -> Tensor:
    """Compute AOT of sorted chosen against sorted rejected log-ratios, over all pairs of the step: float32 [pairs].

    Melnyk et al. 2024 (2406.05882), eq. 6, as in TRL.
    """
    chosen, rejected = pairs.chosen_logratio.sort().values, pairs.rejected_logratio.sort().values
    return smoothed(o.beta * (chosen - rejected), 1.0, o.label_smoothing)


def kl_estimate(logratio: Tensor, weight: Tensor, is_mismatched: Tensor) -> Tensor:
    """Estimate KTO's z0: the mean log-ratio of completions under another prompt, clamped to at least 0. No gradient.

    Args:
        logratio, weight: float32 [completions]; is_mismatched: bool [completions].
    """
    counted = weight * is_mismatched
    mean = (counted.double() * logratio.detach().double()).sum() / counted.double().sum().clamp(min=1e-12)
    return mean.clamp(min=0).float()


def kto(logratio: Tensor, label: Tensor, z0: Tensor, o: KtoObjective) -> Tensor:
    """Compute KTO: float32 [completions], 0 where there is no label. Ethayarajh et al. 2024 (2402.01306), eq. 8.

    Args:
        logratio: float32 [completions]; label: 1 desirable, -1 undesirable, 0 neither.
    """
    value = 1 - (o.beta * label * (logratio - z0)).sigmoid()
    weight = torch.where(label > 0, o.desirable_weight, o.undesirable_weight) * label.abs()
    return weight * value


def listwise(logratio: Tensor, scores: Tensor, group: Tensor, o: ListwiseObjective) -> Tensor:
    """Compute each completion's share of its ranking's negative log-likelihood (Plackett-Luce): float32 [completions].

    Rafailov et al. 2023 (2305.18290), eq. 18: a completion competes with those of its group that are ranked below it.

    Args:
        logratio, scores: float32 [completions]; a NaN score is not part of any ranking; group: int64 [completions].
    """
    reward = o.beta * logratio
    below = (group[:, None] == group[None, :]) & (scores[None, :] < scores[:, None])  # [completions, completions]
    competes = below | torch.eye(len(reward), dtype=torch.bool, device=reward.device)
    against = torch.where(competes, reward[None, :], float("-inf"))
    return against.logsumexp(dim=1) - reward


def step_kto(logps: StepLogps, o: KtoObjective) -> Tensor:
    """Compute KTO of a whole step: float32 [completions]."""
    z0 = kl_estimate(logps.logratio, logps.weight, logps.is_mismatched)
    return kto(logps.logratio, logps.label, z0, o)


def step_listwise(logps: StepLogps, o: ListwiseObjective) -> Tensor:
    """Compute the ranking loss of a whole step: float32 [completions]."""
    return listwise(logps.logratio, logps.scores, logps.group, o)


LOSSES = {
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "kto": step_kto,
    "listwise": step_listwise,
}
