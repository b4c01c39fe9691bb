"""How the frozen reference model's log-probs are computed and checked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import StrictModel


class AuditConfig(StrictModel):
    """Compare stored reference log-probs with the training stack's own forward pass before step 1."""

    groups: int = Field(default=64, ge=0)
    """Preference groups that are scored again; 0 turns the audit off."""

    max_token_drift: float | None = Field(default=None, gt=0)
    """Largest |difference| of one token's log-prob, in nats. Default: 1e-4 in float32, 0.5 in bfloat16."""

    max_mean_drift: float | None = Field(default=None, gt=0)
    """Largest mean |difference|. Default: 1e-5 in float32, 0.05 in bfloat16."""

    on_drift: Literal["stop", "warn"] = "stop"
    """Out of tolerance: stop before the first update, or only say so."""


class ReferenceConfig(StrictModel):
    """Say which engine scores, how many there are, and where their results are kept."""

    engine: Literal["vllm", "trainer"] = "vllm"
    """vllm: a pool of vLLM engines. trainer: the training stack's own forward pass, without gradients."""

    replicas: int = Field(default=1, gt=0)
    """Engines in the pool."""

    cpus_per_replica: float = Field(default=1, gt=0)
    gpus_per_replica: float | None = Field(default=None, ge=0)
    """Default: 1 where the machine that runs the command has CUDA, 0 otherwise."""

    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that an engine takes; the rest is headroom for logits, which vLLM does not profile."""

    max_batched_tokens: int = Field(default=8192, gt=0)
    """Tokens of one engine step."""

    share_prompt: bool = True
    """Reuse a prompt's KV cache between its completions (guarded: a hit that reaches a completion is scored again)."""

    store: str | None = None
    """Where token log-probs are kept for all runs. Default: OUTPUT/reference-store."""

    groups_per_granule: int = Field(default=512, gt=0)
    """Groups scored and committed to the store at once: what a lost engine costs."""

    audit: AuditConfig = AuditConfig()
