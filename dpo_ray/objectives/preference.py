"""Losses over preference pairs, given summed log-probs of policy and reference. Pure functions on flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """What a pairwise loss sees; all float32 [pairs]."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    preference_probability: Tensor  # that chosen is really the better one

    @property
    def chosen_logratio(self) -> Tensor:
        """log pi(y+|x) - log pi_ref(y+|x)"""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """log pi(y-|x) - log pi_ref(y-|x)"""
        return self.policy_rejected - self.reference_rejected


def sigmoid(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute DPO's loss [pairs]: Rafailov et al. 2023 (2305.18290), eq. 7.

    A pair's preference probability p < 1 and `label_smoothing` e mix in the flipped label (conservative DPO,
    https://ericmitchell.ai/cdpo.pdf, eq. 3): q = p (1 - e) + (1 - p) e is the probability that chosen is better.
    """
    margin = beta * (pairs.chosen_logratio - pairs.rejected_logratio)
    p = pairs.preference_probability
    q = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return -q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin)


def ipo(pairs: PairLogps, beta: float) -> Tensor:
    """Compute IPO's loss [pairs]: Azar et al. 2023 (2310.12036), eq. 17, with log-ratios per token as TRL has it.

    With preference probability p the target of the margin is (2p - 1) / (2 beta), its expectation over the label.
    """
    margin = pairs.chosen_logratio / pairs.chosen_tokens - pairs.rejected_logratio / pairs.rejected_tokens
    return (margin - (2 * pairs.preference_probability - 1) / (2 * beta)) ** 2
