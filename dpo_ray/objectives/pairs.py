"""Losses that learn from preference pairs with a reference model. Each loss is a pure function that returns float32 [pairs]."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config.objective import (
    ApoDownObjective,
    ApoZeroObjective,
    BcoPairObjective,
    DiscopopObjective,
    DpopObjective,
    ExoPairObjective,
    HingeObjective,
    IpoObjective,
    NcaPairObjective,
    RDpoObjective,
    RobustObjective,
    RpoObjective,
    SigmoidNormObjective,
    SigmoidObjective,
    SppoHardObjective,
)
from dpo_ray.config.shaping import Divergence, ReverseKl

from .shaping import divergence_score


@dataclass(frozen=True)
class PairLogps:
    """The input of a pairwise loss. All tensors are float32 [pairs]. The fields `*_tokens` count the tokens of the completions."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    preference_probability: Tensor  # probability that chosen is really the better one
    mean_chosen_tokens: float = (
        1.0  # weighted mean over the step; dividing by it makes a mean over pairs one over tokens
    )
    divergence: Divergence = field(default_factory=ReverseKl)

    @property
    def chosen_logratio(self) -> Tensor:
        """The log-ratio of the chosen completion: log pi(y+|x) - log pi_ref(y+|x)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """The log-ratio of the rejected completion: log pi(y-|x) - log pi_ref(y-|x)."""
        return self.policy_rejected - self.reference_rejected

    @property
    def chosen_score(self) -> Tensor:
        """The log-ratio of the chosen completion, transformed by the f-divergence."""
        return divergence_score(self.chosen_logratio, self.divergence)

    @property
    def rejected_score(self) -> Tensor:
        """The log-ratio of the rejected completion, transformed by the f-divergence."""
        return divergence_score(self.rejected_logratio, self.divergence)

    @property
    def margin(self) -> Tensor:
        """The score of chosen minus the score of rejected, which is DPO's margin divided by beta."""
        return self.chosen_score - self.rejected_score

    @property
    def margin_per_token(self) -> Tensor:
        """The score of chosen minus the score of rejected, each divided by the number of tokens of its completion."""
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens

    def of(self, chosen: Tensor) -> PairLogps:
        """Return only the pairs for which `chosen` (bool [pairs]) is True."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[chosen] for name, t in tensors.items() if isinstance(t, Tensor)})

    def swapped(self) -> PairLogps:
        """Return the pairs with chosen and rejected exchanged."""
        return replace(
            self,
            policy_chosen=self.policy_rejected,
            policy_rejected=self.policy_chosen,
            reference_chosen=self.reference_rejected,
            reference_rejected=self.reference_chosen,
            chosen_tokens=self.rejected_tokens,
            rejected_tokens=self.chosen_tokens,
            preference_probability=1 - self.preference_probability,
        )


def smoothed(margin: Tensor, probability: Tensor | float, label_smoothing: float) -> Tensor:
    """Compute -q log sigmoid(margin) - (1 - q) log sigmoid(-margin), q = p (1 - e) + (1 - p) e.

    This is the logistic loss for labels that are right with probability p and flipped with probability e (label_smoothing).
    Source: conservative DPO, https://ericmitchell.ai/cdpo.pdf, eq. 3.
    """
    q = probability * (1 - label_smoothing) + (1 - probability) * label_smoothing
    return -q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin)


def sigmoid(pairs: PairLogps, o: SigmoidObjective) -> Tensor:
    """Compute DPO: Rafailov et al. 2023 (2305.18290), eq. 7. With a soft label, the loss is the expectation over the label."""
    return smoothed(o.beta * pairs.margin, pairs.preference_probability, o.label_smoothing)


def sigmoid_norm(pairs: PairLogps, o: SigmoidNormObjective) -> Tensor:
    """Compute length-normalised DPO: Lambert et al. 2024 (Tulu 3, 2411.15124), eq. 6."""
    return smoothed(o.beta * pairs.margin_per_token, pairs.preference_probability, o.label_smoothing)


def hinge(pairs: PairLogps, o: HingeObjective) -> Tensor:
    """Compute max(0, 1 - beta * margin): Liu et al. 2023 (2309.06657), eq. 8."""
    return F.relu(1 - o.beta * pairs.margin)


def ipo(pairs: PairLogps, o: IpoObjective) -> Tensor:
    """Compute IPO: Azar et al. 2023 (2310.12036), eq. 17, with log-ratios per token as in TRL.

    For a soft label with preference probability p, the target of the margin is the expected target, (2p - 1) / (2 beta).
    """
    return (pairs.margin_per_token - (2 * pairs.preference_probability - 1) / (2 * o.beta)) ** 2


def exo_pair(pairs: PairLogps, o: ExoPairObjective) -> Tensor:
    """Compute EXO: Ji et al. 2024 (2402.00856), eq. 16: KL(policy's preference || smoothed label)."""
    m, e = o.beta * pairs.margin, o.label_smoothing
    log_chosen, log_rejected = F.logsigmoid(m), F.logsigmoid(-m)
    label = pairs.policy_chosen.new_tensor([1 - e, e]).log()
    return log_chosen.exp() * (log_chosen - label[0]) + log_rejected.exp() * (log_rejected - label[1])


def nca_pair(pairs: PairLogps, o: NcaPairObjective) -> Tensor:
    """Compute NCA: Chen et al. 2024 (2402.05369), eq. 11, for K = 2."""
    chosen, rejected = o.beta * pairs.chosen_score, o.beta * pairs.rejected_score
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(pairs: PairLogps, o: RobustObjective) -> Tensor:
    """Compute robust DPO: Chowdhury et al. 2024 (2403.00409), eq. 12."""
    m, e = o.beta * pairs.margin, o.label_smoothing
    return (-(1 - e) * F.logsigmoid(m) + e * F.logsigmoid(-m)) / (1 - 2 * e)


def bco_pair(pairs: PairLogps, o: BcoPairObjective) -> Tensor:
    """Compute BCO: Jung et al. 2024 (2404.04656), eq. 8, but as in TRL without the reward shift."""
    return -F.logsigmoid(o.beta * pairs.chosen_score) - F.logsigmoid(-o.beta * pairs.rejected_score)


def sppo_hard(pairs: PairLogps, o: SppoHardObjective) -> Tensor:
    """Compute SPPO: Wu et al. 2024 (2405.00675), eq. 4.8, with hard labels."""
    target = 1 / (2 * o.beta)
    return (pairs.chosen_score - target) ** 2 + (pairs.rejected_score + target) ** 2


def apo_zero(pairs: PairLogps, o: ApoZeroObjective) -> Tensor:
    """Compute APO-zero: D'Oosterlinck et al. 2024 (2408.06266), eq. 7."""
    return 1 - (o.beta * pairs.chosen_logratio).sigmoid() + (o.beta * pairs.rejected_logratio).sigmoid()


def apo_down(pairs: PairLogps, o: ApoDownObjective) -> Tensor:
    """Compute APO-down: D'Oosterlinck et al. 2024 (2408.06266), eq. 8."""
    margin = pairs.chosen_logratio - pairs.rejected_logratio
    return (o.beta * pairs.chosen_logratio).sigmoid() + 1 - (o.beta * margin).sigmoid()


def discopop(pairs: PairLogps, o: DiscopopObjective) -> Tensor:
    """Compute DiscoPOP, the log-ratio modulated loss: Lu et al. 2024 (2406.08414), eq. 5."""
    m = o.beta * pairs.margin
    blend = (m / o.tau).sigmoid()
    return -(1 - blend) * F.logsigmoid(m) + blend * (-m).exp()


def rpo(pairs: PairLogps, o: RpoObjective) -> Tensor:
    """Compute DPO plus the negative log-likelihood per token of the chosen completion: Pang et al. 2024 (2404.19733), eq. 1."""
    return -F.logsigmoid(o.beta * pairs.margin) - o.alpha * pairs.policy_chosen / pairs.chosen_tokens


def dpop(pairs: PairLogps, o: DpopObjective) -> Tensor:
    """Compute DPO-Positive: Pal et al. 2024 (2402.13228), eq. 3."""
    below_reference = F.relu(-pairs.chosen_logratio)
    return -F.logsigmoid(o.beta * (pairs.chosen_logratio - pairs.rejected_logratio - o.penalty * below_reference))


def r_dpo(pairs: PairLogps, o: RDpoObjective) -> Tensor:
    """Compute length-regularised DPO: Park et al. 2024 (2403.19159), eq. 9."""
    return -F.logsigmoid(o.beta * pairs.margin + o.alpha * (pairs.chosen_tokens - pairs.rejected_tokens))


LOSSES = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "rpo": rpo,
    "dpop": dpop,
    "r_dpo": r_dpo,
}
