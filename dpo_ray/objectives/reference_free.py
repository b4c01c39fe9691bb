"""Losses that learn from preference pairs without a reference model. Each loss is a pure function that returns float32 [pairs].

As in TRL, a likelihood term is a mean over all chosen tokens of the step. The loss of a step is a mean over pairs; so each pair
contributes the summed log-prob of its chosen completion, divided by the mean number of chosen tokens per pair in the step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config.objective import CpoObjective, OrpoObjective, SftObjective, SimpoObjective, SlicObjective

from .pairs import PairLogps, smoothed


def nll(pairs: PairLogps) -> Tensor:
    """Compute what each pair contributes to the mean negative log-likelihood of all chosen tokens of the step."""
    return -pairs.policy_chosen / pairs.mean_chosen_tokens


def sft(pairs: PairLogps, o: SftObjective) -> Tensor:
    """Compute the negative log-likelihood of the chosen completion. The rejected completion is not used."""
    return nll(pairs)


def simpo(pairs: PairLogps, o: SimpoObjective) -> Tensor:
    """Compute SimPO: Meng et al. 2024 (2405.14734), eq. 6."""
    difference = pairs.policy_chosen / pairs.chosen_tokens - pairs.policy_rejected / pairs.rejected_tokens
    return smoothed(o.beta * difference - o.gamma, 1.0, o.label_smoothing)


def cpo(pairs: PairLogps, o: CpoObjective) -> Tensor:
    """Compute CPO: Xu et al. 2024 (2401.08417), eq. 5 to 8."""
    preferred = smoothed(o.beta * (pairs.policy_chosen - pairs.policy_rejected), 1.0, o.label_smoothing)
    return preferred + o.alpha * nll(pairs)


def slic(pairs: PairLogps, o: SlicObjective) -> Tensor:
    """Compute SLiC-HF: Zhao et al. 2023 (2305.10425), eq. 2, regularised by the likelihood of the chosen completion."""
    return F.relu(o.delta - (pairs.policy_chosen - pairs.policy_rejected)) + o.alpha * nll(pairs)


def orpo(pairs: PairLogps, o: OrpoObjective) -> Tensor:
    """Compute ORPO: Hong et al. 2024 (2403.07691), eq. 6 and 7, where P(y|x) is the geometric mean over tokens."""
    chosen, rejected = pairs.policy_chosen / pairs.chosen_tokens, pairs.policy_rejected / pairs.rejected_tokens
    log_odds = (chosen - rejected) - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
    return nll(pairs) - o.beta * F.logsigmoid(log_odds)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x < 0 without cancellation: Maechler 2012, `Rmpfr: log1mexp`, eq. 7."""
    x = x.clamp(max=-1e-7)  # a probability of 1 has infinite odds; this keeps its gradient finite
    near = x > -0.6931472
    # A branch gets a harmless argument where it is not selected; otherwise its gradient would be 0 * inf there.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


LOSSES = {
    "sft": sft,
    "simpo": simpo,
    "cpo": cpo,
    "slic": slic,
    "orpo": orpo,
}
