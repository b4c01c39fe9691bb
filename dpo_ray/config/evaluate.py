"""The recipe section `evaluate`: how the finished policy is compared with the reference model."""

from __future__ import annotations

from pydantic import Field

from .base import MOST_ROWS, MOST_TOKENS, StrictModel


class EvaluateConfig(StrictModel):
    """How completions are sampled from the policy and from the reference model on held-out prompts, to compare both."""

    sample_prompts: int = Field(default=64, ge=0, le=MOST_ROWS)
    """Number of held-out prompts for which completions are sampled. 0: nothing is sampled, so there is no KL
    estimate and no comparison of samples. Without data.eval, the default is 0."""

    max_new_tokens: int = Field(default=128, gt=0, le=MOST_TOKENS)
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Sampling temperature. The KL estimate is unbiased only at 1, because samples then follow the distribution of the
    policy."""

    shown_samples: int = Field(default=8, ge=0, le=1_000_000)
    """Number of prompts for which the report shows the completions of policy and reference side by side."""
