"""What is made of log-probs before an objective sees them: the divergence, and weights of tokens and pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .base import StrictModel
from .objective import Objective, summands


class ReverseKl(StrictModel):
    """The Kullback-Leibler divergence of DPO: scores are log-ratios."""

    type: Literal["reverse_kl"] = "reverse_kl"


class ForwardKl(StrictModel):
    """Scores are -1 / ratio."""

    type: Literal["forward_kl"] = "forward_kl"


class JsDivergence(StrictModel):
    """Jensen-Shannon: scores are log sigmoid(log-ratio), up to a constant."""

    type: Literal["js"] = "js"


class AlphaDivergence(StrictModel):
    """Scores are ratio^(alpha - 1) / (alpha - 1)."""

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
    """What is made of log-probs before the objective sees them."""

    divergence: Divergence = ReverseKl()
    """The divergence from the reference that is held down: reverse_kl, forward_kl, js or {type: alpha, alpha: 0.5}.
    Wang et al. 2023 (2309.16240), table 1."""

    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of the tokens of a completion beyond the length of the shorter one of its pair, for policy and reference.
    Liu et al. 2024 (LD-DPO, 2409.06411), eq. 10."""

    wpo: bool = False
    """Weigh pairs by how likely the policy itself would write them. Zhou et al. 2024 (WPO, 2406.11827), eq. 3 and 4."""

    def problems(self, objective: Objective) -> Iterator[tuple[str, str]]:
        """Yield each field that the objective cannot honour, with the reason."""
        for _, single in summands(objective):
            name = single.type
            if self.divergence.type != "reverse_kl" and not single.diverges:
                yield "divergence", f"`{name}` knows reverse_kl alone, not {self.divergence.type}"
            if self.ld_alpha != 1.0 and not single.compares_lengths:
                yield (
                    "ld_alpha",
                    f"`{name}` is no comparison of a pair's log-ratios alone, whose lengths could be compared",
                )
            if self.wpo and not single.weighable:
                yield "wpo", f"`{name}` has no loss of a pair that could be weighed"
