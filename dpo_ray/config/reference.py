"""The recipe section `reference`: how the log-probs of the frozen reference model are computed and checked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .base import MOST_PROCESSES, MOST_ROWS, MOST_TOKENS, StrictModel, field_error


class AuditConfig(StrictModel):
    """The audit before step 1: stored reference log-probs are compared with the training workers' own forward pass."""

    groups: int = Field(default=64, ge=0, le=MOST_ROWS)
    """Number of preference groups whose log-probs the training workers compute again. These are the groups of the first
    training steps, so the number is rounded up to full steps. 0: no audit."""

    max_token_drift: float | None = Field(default=None, gt=0)
    """Largest |difference| between the two log-probs of a token, in nats. Default: 1e-3 in float32, 0.5 in bfloat16."""

    max_mean_drift: float | None = Field(default=None, gt=0)
    """Largest mean of |difference| over all tokens, in nats. Default: 1e-4 in float32, 0.05 in bfloat16."""

    max_bias: float | None = Field(default=None, gt=0)
    """Largest |mean of the difference| over all tokens, in nats. Such a bias adds up over tokens, so it rewards or
    punishes length. Default: 5e-5 in float32, 2e-3 in bfloat16. Needs 16 groups or more."""

    max_margin_error: float | None = Field(default=None, gt=0)
    """Largest value of beta * (standard deviation, over pairs, of the error in the reference margin). Default: 1e-3 in
    float32, 0.1 in bfloat16. Needs 16 pairs or more."""

    on_drift: Literal["stop", "use_trainer", "warn"] = "stop"
    """What happens if a limit is exceeded. stop: the run stops before step 1. use_trainer: the trainer computes all
    reference log-probs again, so they agree with training. warn: the run continues with a warning."""


class ReferenceConfig(StrictModel):
    """Which engine computes the reference log-probs, how many engines there are, and where the log-probs are stored."""

    engine: Literal["vllm", "trainer"] = "vllm"
    """What computes the log-probs. vllm: a pool of vLLM engines. trainer: the training workers, with their own sharded
    forward pass and no gradients."""

    mode: Literal["ahead", "streaming"] = "ahead"
    """ahead: all log-probs are computed before training starts. streaming: training starts as soon as the log-probs of
    its first steps are known, so engines and training need resources at the same time. The resulting weights are equal."""

    replicas: int = Field(default=1, gt=0, le=MOST_PROCESSES)
    """Number of engines in the pool. `cluster.roles.reference` sets what each engine requests."""

    max_replicas: int | None = Field(default=None, gt=0, le=MOST_PROCESSES)
    """The pool grows up to this number of engines while there is work and the cluster has free resources. Default:
    replicas."""

    tensor_parallel: int = Field(default=1, gt=0, le=1024)
    """Number of GPUs of one node over which each engine splits its model. Use more than 1 only if the model does not fit
    on one GPU."""

    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM reserves. The logits must fit in the remaining memory, because vLLM does not
    count them."""

    max_batched_tokens: int | None = Field(default=None, gt=0, le=MOST_TOKENS)
    """Largest number of tokens in one forward pass of an engine. Default: the largest number whose logits fit in
    memory."""

    share_prompt: bool = True
    """Reuse the KV cache of a prompt for all its completions. If a cache hit extends into a completion, the log-probs
    of this completion are computed again without the cache."""

    store: str | None = None
    """The directory or URI where all runs store their reference log-probs. Default: OUTPUT/reference-store."""

    groups_per_granule: int = Field(default=1024, gt=0, le=10_000_000)
    """Number of preference groups in one unit of work (granule) of an engine. The log-probs of a granule are committed
    together. If an engine dies, only its unfinished granules are lost."""

    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> ReferenceConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise field_error("max_replicas", f"{self.max_replicas} is less than replicas={self.replicas}")
        if self.mode == "streaming" and self.engine == "trainer":
            raise field_error(
                "mode", "the trainer cannot compute log-probs while it trains: use mode=ahead, or engine=vllm"
            )
        if self.tensor_parallel > 1 and self.engine == "trainer":
            raise field_error(
                "tensor_parallel",
                "is only for engine=vllm, as the trainer shards the model over train.workers: leave it out",
            )
        return self
