"""From the recipe's objective to its loss function."""

from __future__ import annotations

from typing import assert_never

from torch import Tensor

from dpo_ray.config.objective import IpoObjective, Objective, SigmoidObjective

from . import preference
from .preference import PairLogps


def pair_losses(objective: Objective, pairs: PairLogps) -> Tensor:
    """Compute the objective's loss of every pair, float32 [pairs]."""
    match objective:
        case SigmoidObjective():
            return preference.sigmoid(pairs, objective.beta, objective.label_smoothing)
        case IpoObjective():
            return preference.ipo(pairs, objective.beta)
        case _:
            assert_never(objective)
