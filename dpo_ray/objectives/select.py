"""From the recipe's objective to its loss function."""

from __future__ import annotations

from typing import assert_never

from torch import Tensor

from dpo_ray.config import objective as o
from dpo_ray.config.objective import Objective, Single, fact, summands

from . import preference, reference_free, whole_step
from .preference import PairLogps
from .step_logps import StepLogps, Totals


def step_loss(objective: Objective, logps: StepLogps, totals: Totals) -> Tensor:
    """Compute what `logps` contribute to the loss of the step whose `totals` these are: a float32 scalar.

    Contributions of a step's micro-batches add up to its loss: the mean over its pairs (or labelled completions, or lists)
    by weight. Of an objective that is step-wide (`is_step_wide`), `logps` have to be those of the whole step.
    """
    terms = [weight * _single(single, logps, totals) for weight, single in summands(objective)]
    return sum(terms[1:], start=terms[0])


def _single(objective: Single, logps: StepLogps, totals: Totals) -> Tensor:
    match fact(objective, "learns_from"):
        case "completions":
            assert isinstance(objective, o.KtoObjective)  # noqa: S101
            z0 = whole_step.kl_estimate(logps.logratio, logps.weight, logps.is_mismatched)
            losses = whole_step.kto(logps.logratio, logps.label, z0, objective)
            return (logps.weight * losses).sum() / totals.labelled
        case "lists":
            assert isinstance(objective, o.ListwiseObjective)  # noqa: S101
            losses = whole_step.listwise(logps.logratio, logps.scores, logps.group, objective)
            return (logps.weight * losses).sum() / totals.lists
        case _ if fact(objective, "step_wide"):  # sorts over pairs, which then have no weights of their own
            return pair_losses(objective, logps.pairs.of(logps.pair_weight > 0)).mean()
        case _:
            weight = logps.pair_weight * logps.policy_weight if fact(objective, "weighable") else logps.pair_weight
            return (weight * pair_losses(objective, logps.pairs)).sum() / totals.pairs


def pair_losses(objective: Single, pairs: PairLogps) -> Tensor:
    """Compute an objective's loss of every pair, float32 [pairs], in expectation over soft labels.

    Raises:
        TypeError: the objective does not learn from pairs.
    """
    losses = _labelled(objective, pairs)
    p = pairs.preference_probability
    own = (o.SigmoidObjective, o.SigmoidNormObjective, o.IpoObjective, o.AotObjective, o.AotUnpairedObjective)
    if isinstance(objective, own) or not bool((p < 1).any()):
        return (
            losses  # these take the expectation themselves, or sort over pairs, whose labels then are taken as they are
        )
    return p * losses + (1 - p) * _labelled(objective, pairs.swapped())


def _labelled(objective: Single, pairs: PairLogps) -> Tensor:
    match objective:
        case o.SigmoidObjective():
            return preference.sigmoid(pairs, objective)
        case o.SigmoidNormObjective():
            return preference.sigmoid_norm(pairs, objective)
        case o.HingeObjective():
            return preference.hinge(pairs, objective)
        case o.IpoObjective():
            return preference.ipo(pairs, objective)
        case o.ExoPairObjective():
            return preference.exo_pair(pairs, objective)
        case o.NcaPairObjective():
            return preference.nca_pair(pairs, objective)
        case o.RobustObjective():
            return preference.robust(pairs, objective)
        case o.BcoPairObjective():
            return preference.bco_pair(pairs, objective)
        case o.SppoHardObjective():
            return preference.sppo_hard(pairs, objective)
        case o.AotObjective():
            return whole_step.aot(pairs, objective)
        case o.AotUnpairedObjective():
            return whole_step.aot_unpaired(pairs, objective)
        case o.ApoZeroObjective():
            return preference.apo_zero(pairs, objective)
        case o.ApoDownObjective():
            return preference.apo_down(pairs, objective)
        case o.DiscopopObjective():
            return preference.discopop(pairs, objective)
        case o.RpoObjective():
            return preference.rpo(pairs, objective)
        case o.DpopObjective():
            return preference.dpop(pairs, objective)
        case o.RDpoObjective():
            return preference.r_dpo(pairs, objective)
        case o.SftObjective():
            return reference_free.sft(pairs, objective)
        case o.OrpoObjective():
            return reference_free.orpo(pairs, objective)
        case o.SimpoObjective():
            return reference_free.simpo(pairs, objective)
        case o.CpoObjective():
            return reference_free.cpo(pairs, objective)
        case o.SlicObjective():
            return reference_free.slic(pairs, objective)
        case o.KtoObjective() | o.ListwiseObjective():
            raise TypeError(f"{objective.type} does not learn from pairs")
        case _:
            assert_never(objective)
