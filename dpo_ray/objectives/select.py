"""Computes the loss of a step for the objective of the recipe, with a table of all losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dpo_ray.config.extension import OBJECTIVES, installed
from dpo_ray.config.objective import Objective, Single, summands

from . import pairs, reference_free, step_wide
from .pairs import PairLogps
from .step_logps import StepLogps, Totals

_BUILT_IN = pairs.LOSSES | reference_free.LOSSES | step_wide.LOSSES
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = _BUILT_IN | installed(OBJECTIVES, _BUILT_IN)
"""The loss functions by the objective's `type`.

A loss that learns from pairs takes (PairLogps, objective); a loss that learns from completions or lists takes
(StepLogps, objective)."""


def step_loss(objective: Objective, logps: StepLogps, totals: Totals) -> Tensor:
    """Compute what the completions and pairs in `logps` contribute to the loss of their step: a float32 scalar.

    `totals` are the sums of weights over the whole step. The contributions of all micro-batches add up to the loss of the
    step: the weighted mean over the pairs, labelled completions or lists of the step. If the objective is step-wide
    (`is_step_wide`), `logps` must contain the whole step.
    """
    terms = [weight * _term(single, logps, totals) for weight, single in summands(objective)]
    return sum(terms[1:], start=terms[0])


def _term(objective: Single, logps: StepLogps, totals: Totals) -> Tensor:
    match objective.learns_from:
        case "completions":
            return (logps.weight * LOSSES[objective.type](logps, objective)).sum() / totals.labelled
        case "lists":
            return (logps.weight * LOSSES[objective.type](logps, objective)).sum() / totals.lists
        case "pairs" if objective.step_wide:  # the loss sorts the values of all pairs, so a pair has no own weight
            return pair_losses(objective, logps.pairs.of(logps.pair_weight > 0)).mean()
        case "pairs":
            weight = logps.pair_weight * logps.policy_weight if objective.weighable else logps.pair_weight
            return (weight * pair_losses(objective, logps.pairs)).sum() / totals.pairs


def pair_losses(objective: Single, logps: PairLogps) -> Tensor:
    """Compute the loss of every pair, float32 [pairs]. With a soft label, it is the expectation over the label.

    Raises:
        TypeError: the objective does not learn from pairs.
    """
    if objective.learns_from != "pairs":
        raise TypeError(f"{objective.type} learns from {objective.learns_from}, not from pairs")
    loss, p = LOSSES[objective.type], logps.preference_probability
    losses = loss(logps, objective)
    if objective.takes_soft_labels or not bool((p < 1).any()):
        return losses
    return p * losses + (1 - p) * loss(logps.swapped(), objective)
