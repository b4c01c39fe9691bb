"""The section `reference`: how the log-probs of the frozen reference model are computed and checked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .base import MOST_PROCESSES, MOST_ROWS, MOST_TOKENS, StrictModel, field_error


class AuditConfig(StrictModel):
    """The comparison of stored reference log-probs with the training stack's own forward pass, before step 1."""

    groups: int = Field(default=64, ge=0, le=MOST_ROWS)
    """Preference groups that are scored again: the first in training's random order, rounded up to whole steps. 0: no
    audit."""

    max_token_drift: float | None = Field(default=None, gt=0)
    """Largest |difference| of the log-prob of a token, in nats. Default: 1e-3 in float32, 0.5 in bfloat16."""

    max_mean_drift: float | None = Field(default=None, gt=0)
    """Largest mean |difference|. Default: 1e-4 in float32, 0.05 in bfloat16."""

    max_bias: float | None = Field(default=None, gt=0)
    """Largest |mean difference|: a bias rewards length. Default: 5e-5 in float32, 2e-3 in bfloat16. Needs 16 groups or
    more."""

    max_margin_error: float | None = Field(default=None, gt=0)
    """Largest beta * standard deviation of a pair's margin error. Default: 1e-3 in float32, 0.1 in bfloat16. Needs 16
    pairs or more."""

    on_drift: Literal["stop", "use_trainer", "warn"] = "stop"
    """If a tolerance is exceeded: stop before the first update, score all again with the trainer, which is exact, or
    only warn."""


class ReferenceConfig(StrictModel):
    """Which engine scores the reference, how many engines there are, and where their results are stored."""

    engine: Literal["vllm", "trainer"] = "vllm"
    """vllm: a pool of vLLM engines. trainer: the training workers' own sharded forward pass, without gradients."""

    mode: Literal["ahead", "streaming"] = "ahead"
    """ahead: everything is scored before training starts. streaming: training starts as soon as its first steps are
    scored, and the engines need resources of their own. The resulting weights are the same."""

    replicas: int = Field(default=1, gt=0, le=MOST_PROCESSES)
    """Number of engines in the pool; `cluster.roles.reference` is what each requests."""

    max_replicas: int | None = Field(default=None, gt=0, le=MOST_PROCESSES)
    """The pool grows up to this number while there is work and the cluster has free resources. Default: replicas."""

    tensor_parallel: int = Field(default=1, gt=0, le=1024)
    """GPUs of one node over which the model of an engine is split; use more than 1 only if the model does not fit on
    one GPU."""

    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that an engine uses; the rest is headroom for logits, which vLLM does not profile."""

    max_batched_tokens: int | None = Field(default=None, gt=0, le=MOST_TOKENS)
    """Tokens of one engine step. Default: as many as the memory for the logits of a step allows."""

    share_prompt: bool = True
    """Reuse the KV cache of a prompt for all its completions (guarded: a cache hit that extends into a completion is
    scored again)."""

    store: str | None = None
    """Where the token log-probs of all runs are stored. Default: OUTPUT/reference-store."""

    groups_per_granule: int = Field(default=1024, gt=0, le=10_000_000)
    """Groups that are scored and committed to the store together: the work that is lost with an engine."""

    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> ReferenceConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise field_error("max_replicas", f"at least replicas={self.replicas} is expected")
        if self.mode == "streaming" and self.engine == "trainer":
            raise field_error("mode", "the trainer cannot score while it trains; use mode=ahead, or engine=vllm")
        if self.tensor_parallel > 1 and self.engine == "trainer":
            raise field_error("tensor_parallel", "is only for engine=vllm; the trainer shards over train.workers")
        return self
