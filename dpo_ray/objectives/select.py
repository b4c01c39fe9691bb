"""From the recipe's objective to its loss function."""

from __future__ import annotations

from typing import assert_never

from torch import Tensor

from dpo_ray.config.objective import IpoObjective, Objective, SigmoidObjective

from . import preference
from .preference import PairLogps


def needs_pairs(objective: Objective) -> bool:
    """Say whether an objective compares two completions of a prompt, so that a group without pairs teaches it nothing."""
    match objective:
        case SigmoidObjective() | IpoObjective():
            return True
        case _:
            assert_never(objective)


def compares_per_token(objective: Objective) -> bool:
    """Say whether an objective compares log-ratios per token, so that a completion's length does not scale them."""
    match objective:
        case SigmoidObjective():
            return False
        case IpoObjective():
            return True
        case _:
            assert_never(objective)


def pair_losses(objective: Objective, pairs: PairLogps) -> Tensor:
    """Compute the objective's loss of every pair, float32 [pairs]."""
    match objective:
        case SigmoidObjective():
            return preference.sigmoid(pairs, objective.beta, objective.label_smoothing)
        case IpoObjective():
            return preference.ipo(pairs, objective.beta)
        case _:
            assert_never(objective)
