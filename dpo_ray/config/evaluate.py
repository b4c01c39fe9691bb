"""The section `evaluate`: what is measured on the finished policy."""

from __future__ import annotations

from pydantic import Field

from .base import MOST_ROWS, MOST_TOKENS, StrictModel


class EvaluateConfig(StrictModel):
    """Sampling from the policy and the reference on held-out prompts, to compare them."""

    sample_prompts: int = Field(default=64, ge=0, le=MOST_ROWS)
    """Held-out prompts to sample completions for; 0, which is the default without data.eval: no sampling, so no KL
    estimate and no comparison of samples."""

    max_new_tokens: int = Field(default=128, gt=0, le=MOST_TOKENS)
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """1 samples from the policy itself; only then is the KL estimate unbiased."""

    shown_samples: int = Field(default=8, ge=0, le=1_000_000)
    """Prompts whose two completions are shown side by side in the report."""
