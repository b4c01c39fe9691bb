"""What is measured on the finished policy."""

from __future__ import annotations

from pydantic import Field

from .base import StrictModel


class EvaluateConfig(StrictModel):
    """Sample from policy and reference on held-out prompts, and compare."""

    sample_prompts: int = Field(default=64, ge=0)
    """Held-out prompts to sample from; 0: no sampling (then no KL and no side-by-side)."""

    max_new_tokens: int = Field(default=128, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    """1 samples the policy itself, which is what makes the KL estimate unbiased."""

    shown_samples: int = Field(default=8, ge=0)
    """Prompts whose two completions are printed side by side in the report."""
