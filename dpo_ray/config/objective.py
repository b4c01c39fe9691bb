"""The configuration of the preference objectives, one class for each `type`. `dpo_ray.objectives` has the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import BeforeValidator, Field

from .base import StrictModel
from .extension import OBJECTIVE_CONFIGS, OBJECTIVES, ObjectiveConfig, installed_configs

Beta = Annotated[float, Field(gt=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class SigmoidObjective(ObjectiveConfig):
    """DPO: -log sigmoid(beta * margin). Rafailov et al. 2023 (2305.18290), eq. 7."""

    type: Literal["sigmoid"] = "sigmoid"
    beta: Beta = 0.1
    """Strength of the pull towards the reference, in 1/nat."""

    label_smoothing: Smoothing = 0.0
    """Share of the labels that are assumed to be flipped, that is, wrong (conservative DPO)."""

    diverges: ClassVar[bool] = True
    takes_soft_labels: ClassVar[bool] = True


class SigmoidNormObjective(ObjectiveConfig):
    """DPO on mean log-ratios per token (Tulu 3's dpo_norm). Lambert et al. 2024 (2411.15124), eq. 6."""

    type: Literal["sigmoid_norm"] = "sigmoid_norm"
    beta: Beta = 5.0
    label_smoothing: Smoothing = 0.0
    per_token: ClassVar[bool] = True
    diverges: ClassVar[bool] = True
    takes_soft_labels: ClassVar[bool] = True


class HingeObjective(ObjectiveConfig):
    """Hinge loss: max(0, 1 - beta * margin). Liu et al. 2023 (RSO, 2309.06657), eq. 8."""

    type: Literal["hinge"] = "hinge"
    beta: Beta = 0.1
    diverges: ClassVar[bool] = True


class IpoObjective(ObjectiveConfig):
    """IPO: (margin per token - 1 / (2 beta))^2. Azar et al. 2023 (2310.12036), eq. 17, length-normalised as in TRL."""

    type: Literal["ipo"] = "ipo"
    beta: Beta = 0.1
    """The paper's tau."""

    per_token: ClassVar[bool] = True
    diverges: ClassVar[bool] = True
    takes_soft_labels: ClassVar[bool] = True


class ExoPairObjective(ObjectiveConfig):
    """EXO: reverse KL from the policy's preference to the smoothed label. Ji et al. 2024 (2402.00856), eq. 16."""

    type: Literal["exo_pair"] = "exo_pair"
    beta: Beta = 0.1
    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    diverges: ClassVar[bool] = True


class NcaPairObjective(ObjectiveConfig):
    """NCA: contrasts completions with noise, so that the likelihood of chosen does not fall.

    Chen et al. 2024 (2402.05369), eq. 11.
    """

    type: Literal["nca_pair"] = "nca_pair"
    beta: Beta = 0.1
    diverges: ClassVar[bool] = True


class RobustObjective(ObjectiveConfig):
    """Robust DPO: its loss is unbiased even if some labels are flipped. Chowdhury et al. 2024 (2403.00409), eq. 12."""

    type: Literal["robust"] = "robust"
    beta: Beta = 0.1
    label_smoothing: Smoothing = 0.1
    diverges: ClassVar[bool] = True


class BcoPairObjective(ObjectiveConfig):
    """BCO: a logistic classifier of chosen against rejected, whose logit is the reward.

    Jung et al. 2024 (2404.04656), eq. 8, without the reward shift of that paper.
    """

    type: Literal["bco_pair"] = "bco_pair"
    beta: Beta = 0.1
    diverges: ClassVar[bool] = True


class SppoHardObjective(ObjectiveConfig):
    """SPPO with hard labels. Wu et al. 2024 (2405.00675), eq. 4.8.

    The loss is (s+ - 1/(2 beta))^2 + (s- + 1/(2 beta))^2, where s+ and s- are the scores (by default log-ratios) of
    chosen and rejected.
    """

    type: Literal["sppo_hard"] = "sppo_hard"
    beta: Beta = 0.1
    diverges: ClassVar[bool] = True


class AotObjective(ObjectiveConfig):
    """AOT: compares the sorted margins of policy and reference in a step. Melnyk et al. 2024 (2406.05882), eq. 9."""

    type: Literal["aot"] = "aot"
    beta: Beta = 0.1
    label_smoothing: Smoothing = 0.0
    step_wide: ClassVar[bool] = True
    weighable: ClassVar[bool] = False
    takes_soft_labels: ClassVar[bool] = True


class AotUnpairedObjective(ObjectiveConfig):
    """AOT: compares the sorted rewards of chosen and rejected in a step. Melnyk et al. 2024 (2406.05882), eq. 6."""

    type: Literal["aot_unpaired"] = "aot_unpaired"
    beta: Beta = 0.1
    label_smoothing: Smoothing = 0.0
    step_wide: ClassVar[bool] = True
    weighable: ClassVar[bool] = False
    takes_soft_labels: ClassVar[bool] = True


class ApoZeroObjective(ObjectiveConfig):
    """APO-zero: raises the reward of chosen, lowers that of rejected. D'Oosterlinck et al. 2024 (2408.06266), eq. 7."""

    type: Literal["apo_zero"] = "apo_zero"
    beta: Beta = 0.1


class ApoDownObjective(ObjectiveConfig):
    """APO-down: lowers both rewards, that of rejected more. D'Oosterlinck et al. 2024 (2408.06266), eq. 8."""

    type: Literal["apo_down"] = "apo_down"
    beta: Beta = 0.1


class DiscopopObjective(ObjectiveConfig):
    """DiscoPOP: logistic and exponential loss, blended by the margin. Lu et al. 2024 (2406.08414), eq. 5."""

    type: Literal["discopop"] = "discopop"
    beta: Beta = 0.1
    tau: float = Field(default=0.05, gt=0)
    """Temperature of the blend."""

    diverges: ClassVar[bool] = True


class SftObjective(ObjectiveConfig):
    """SFT: the negative log-likelihood of chosen, as the mean over all chosen tokens of the step."""

    type: Literal["sft"] = "sft"
    beta: Beta = 0.1
    """Scales the rewards that are reported, and nothing else."""

    uses_reference: ClassVar[bool] = False
    compares_lengths: ClassVar[bool] = False


class RpoObjective(ObjectiveConfig):
    """RPO: DPO plus the negative log-likelihood of chosen per token. Pang et al. 2024 (2404.19733), eq. 1."""

    type: Literal["rpo"] = "rpo"
    beta: Beta = 0.1
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the log-likelihood."""

    diverges: ClassVar[bool] = True
    compares_lengths: ClassVar[bool] = False


class DpopObjective(ObjectiveConfig):
    """DPO-Positive: a penalty if chosen is less likely than under the reference. Pal et al. 2024 (2402.13228), eq. 3."""

    type: Literal["dpop"] = "dpop"
    beta: Beta = 0.1
    penalty: float = Field(default=50.0, ge=0)
    """The paper's lambda."""


class RDpoObjective(ObjectiveConfig):
    """R-DPO: DPO with a margin that is corrected for length. Park et al. 2024 (2403.19159), eq. 9."""

    type: Literal["r_dpo"] = "r_dpo"
    beta: Beta = 0.1
    alpha: float = Field(default=0.01, ge=0)
    """Correction in nats per token. alpha * (tokens of chosen - tokens of rejected) is added to beta * margin."""

    diverges: ClassVar[bool] = True


class KtoObjective(ObjectiveConfig):
    """KTO: learns from single completions with labels. Ethayarajh et al. 2024 (2402.01306), eq. 8.

    In a pair, chosen counts as desirable and rejected as undesirable. The KL term z0 is estimated once per step, from
    prompts that are combined with the completions of other prompts.
    """

    type: Literal["kto"] = "kto"
    beta: Beta = 0.1
    desirable_weight: float = Field(default=1.0, gt=0)
    undesirable_weight: float = Field(default=1.0, gt=0)
    learns_from: ClassVar[Literal["pairs", "completions", "lists"]] = "completions"
    step_wide: ClassVar[bool] = True
    weighable: ClassVar[bool] = False
    compares_lengths: ClassVar[bool] = False


class OrpoObjective(ObjectiveConfig):
    """ORPO: log-likelihood of chosen, plus beta times a log odds ratio. Hong et al. 2024 (2403.07691), eq. 6 and 7.

    The log-likelihood is the mean over all tokens of chosen completions in the step. As in the paper, tokens of prompts
    do not count; in TRL they do.
    """

    type: Literal["orpo"] = "orpo"
    beta: Beta = 0.1
    """The paper's lambda."""

    uses_reference: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    weighable: ClassVar[bool] = False
    compares_lengths: ClassVar[bool] = False


class SimpoObjective(ObjectiveConfig):
    """SimPO: log-probs per token, a target margin, no reference. Meng et al. 2024 (2405.14734), eq. 6."""

    type: Literal["simpo"] = "simpo"
    beta: Beta = 2.0
    gamma: float = Field(default=0.5, ge=0)
    """Target margin of rewards, TRL's simpo_gamma. The loss is -log sigmoid(beta * difference - gamma)."""

    label_smoothing: Smoothing = 0.0
    uses_reference: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    weighable: ClassVar[bool] = False
    compares_lengths: ClassVar[bool] = False


class CpoObjective(ObjectiveConfig):
    """CPO: DPO with a uniform reference, plus the log-likelihood of chosen. Xu et al. 2024 (2401.08417), eq. 5 to 8."""

    type: Literal["cpo"] = "cpo"
    beta: Beta = 0.1
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the log-likelihood, which is the mean over all chosen tokens of the step."""

    label_smoothing: Smoothing = 0.0
    uses_reference: ClassVar[bool] = False
    weighable: ClassVar[bool] = False
    compares_lengths: ClassVar[bool] = False


class SlicObjective(ObjectiveConfig):
    """SLiC-HF: hinge loss plus the log-likelihood of chosen. Zhao et al. 2023 (2305.10425), eq. 2.

    The hinge loss is max(0, delta - (logp of chosen - logp of rejected)).
    """

    type: Literal["slic"] = "slic"
    beta: Beta = 0.1
    """Scales the rewards that are reported, and nothing else."""

    delta: float = Field(default=1.0, gt=0)
    """Target difference of the two log-probs, in nats."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the log-likelihood, which is the mean over all chosen tokens of the step."""

    uses_reference: ClassVar[bool] = False
    weighable: ClassVar[bool] = False
    compares_lengths: ClassVar[bool] = False


class ListwiseObjective(ObjectiveConfig):
    """DPO on whole rankings (Plackett-Luce model). Rafailov et al. 2023 (2305.18290), eq. 18.

    Completions with equal scores have the same rank; no order among them is learned.
    """

    type: Literal["listwise"] = "listwise"
    beta: Beta = 0.1
    learns_from: ClassVar[Literal["pairs", "completions", "lists"]] = "lists"
    weighable: ClassVar[bool] = False
    compares_lengths: ClassVar[bool] = False


def _type_first(value: Any) -> Any:
    return {"type": "sigmoid", **value} if isinstance(value, dict) else value


BuiltIn = (
    SigmoidObjective
    | SigmoidNormObjective
    | HingeObjective
    | IpoObjective
    | ExoPairObjective
    | NcaPairObjective
    | RobustObjective
    | BcoPairObjective
    | SppoHardObjective
    | AotObjective
    | AotUnpairedObjective
    | ApoZeroObjective
    | ApoDownObjective
    | DiscopopObjective
    | SftObjective
    | RpoObjective
    | DpopObjective
    | RDpoObjective
    | KtoObjective
    | OrpoObjective
    | SimpoObjective
    | CpoObjective
    | SlicObjective
    | ListwiseObjective
)

if TYPE_CHECKING:
    Single = BuiltIn
else:
    _NAMES = {config.model_fields["type"].default for config in get_args(BuiltIn)}
    _ALL = Union[(BuiltIn, *installed_configs(OBJECTIVE_CONFIGS, _NAMES, OBJECTIVES))]
    Single = Annotated[_ALL, Field(discriminator="type"), BeforeValidator(_type_first)]


class Term(StrictModel):
    """One objective in a weighted sum of objectives."""

    weight: float = Field(default=1.0, gt=0)
    objective: Single


class SumObjective(StrictModel):
    """A weighted sum of objectives, such as MPO's: sigmoid, bco_pair and sft. The beta of the first one
    scales the reported rewards."""

    type: Literal["sum"] = "sum"
    terms: tuple[Term, ...] = Field(min_length=1)


Objective = Annotated[Single | SumObjective, Field(discriminator="type"), BeforeValidator(_type_first)]


def summands(objective: Objective) -> tuple[tuple[float, Single], ...]:
    """List the (weight, objective) pairs of a sum. Any other objective counts as a sum of one term with weight 1."""
    if isinstance(objective, SumObjective):
        return tuple((term.weight, term.objective) for term in objective.terms)
    return ((1.0, objective),)


def reward_beta(objective: Objective) -> float:
    """Return the beta that turns log-ratios into the reported rewards. In a sum, the first objective decides."""
    return summands(objective)[0][1].beta


def uses_reference(objective: Objective) -> bool:
    """Return whether the objective, or any objective in a sum, needs the reference model's log-probs."""
    return any(o.uses_reference for _, o in summands(objective))


def is_per_token(objective: Objective) -> bool:
    """Return whether the reported rewards are averages over tokens. In a sum, the first objective decides."""
    return summands(objective)[0][1].per_token


def is_step_wide(objective: Objective) -> bool:
    """Return whether the loss of one pair or completion depends on other pairs or completions of the same step."""
    return any(o.step_wide for _, o in summands(objective))


def kinds_of_groups(objective: Objective) -> set[str]:
    """Return what the objective learns from: "pairs", "completions" or "lists". A sum may learn from several of these."""
    return {o.learns_from for _, o in summands(objective)}
