"""The preference objectives; one class each, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .base import StrictModel


class SigmoidObjective(StrictModel):
    """DPO: -log sigmoid(beta * margin). Rafailov et al. 2023 (2305.18290), eq. 7."""

    type: Literal["sigmoid"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference, in 1/nat."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels assumed to be flipped (conservative DPO)."""


class IpoObjective(StrictModel):
    """IPO: (margin per token - 1 / (2 beta))^2. Azar et al. 2023 (2310.12036), eq. 17, length-normalised as in TRL."""

    type: Literal["ipo"] = "ipo"
    beta: float = Field(default=0.1, gt=0)
    """The paper's tau."""


def _sigmoid_by_default(value: Any) -> Any:
    return {"type": "sigmoid", **value} if isinstance(value, dict) else value


Objective = Annotated[
    SigmoidObjective | IpoObjective, Field(discriminator="type"), BeforeValidator(_sigmoid_by_default)
]
