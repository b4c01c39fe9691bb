"""The section `train.shaping`: how log-probs are changed before the objective uses them.

A divergence can turn log-ratios into other scores, and tokens and pairs can get weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .base import StrictModel
from .objective import Objective, summands


class ReverseKl(StrictModel):
    """Reverse KL, the divergence of DPO: the score of a completion is its log-ratio, log(policy / reference)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class ForwardKl(StrictModel):
    """Forward KL: the score of a completion is -1 / ratio, with ratio = policy / reference."""

    type: Literal["forward_kl"] = "forward_kl"


class JsDivergence(StrictModel):
    """Jensen-Shannon divergence: the score of a completion is log sigmoid(log-ratio), up to a constant."""

    type: Literal["js"] = "js"


class AlphaDivergence(StrictModel):
    """Alpha divergence: a completion's score is ratio^(alpha - 1) / (alpha - 1), with ratio = policy / reference."""

    type: Literal["alpha"] = "alpha"
    alpha: float = Field(default=0.5, gt=0, lt=1)


def _reverse_kl_by_default(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Divergence = Annotated[
    ReverseKl | ForwardKl | JsDivergence | AlphaDivergence,
    Field(discriminator="type"),
    BeforeValidator(_reverse_kl_by_default),
]


class ShapingConfig(StrictModel):
    """How log-probs are changed before the objective uses them: a divergence, and weights of tokens and pairs."""

    divergence: Divergence = ReverseKl()
    """The divergence between policy and reference that the loss penalises: reverse_kl, forward_kl, js or
    {type: alpha, alpha: 0.5}. Wang et al. 2023 (2309.16240), table 1."""

    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """In each pair, the tokens by which one completion is longer than the other get this weight, in the log-probs of
    policy and reference. All other tokens have weight 1. Liu et al. 2024 (LD-DPO, 2409.06411), eq. 10."""

    wpo: bool = False
    """Multiply the loss of each pair by a weight: the larger the policy's probability of the two completions, the
    larger the weight. Zhou et al. 2024 (WPO, 2406.11827), eq. 3 and 4."""

    def problems(self, objective: Objective) -> Iterator[tuple[str, str]]:
        """Yield each field of this section that the objective does not support, with the reason."""
        for _, single in summands(objective):
            name = single.type
            if self.divergence.type != "reverse_kl" and not single.diverges:
                yield "divergence", f"`{name}` supports only reverse_kl, not {self.divergence.type}"
            if self.ld_alpha != 1.0 and not single.compares_lengths:
                yield (
                    "ld_alpha",
                    f"`{name}` does not support ld_alpha, as the loss uses more than the log-ratios of the completions",
                )
            if self.wpo and not single.weighable:
                yield "wpo", f"`{name}` does not support wpo, because the objective has no separate loss for each pair"
