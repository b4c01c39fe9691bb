"""How the policy is trained: objective, batch, optimizer, hardware, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import StrictModel
from .objective import Objective, SigmoidObjective

Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictModel):
    """AdamW with a warm-up and a decay."""

    learning_rate: float = Field(default=5e-7, gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; null: never."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; cosine and linear end at 0."""

    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""


class TrainConfig(StrictModel):
    """Say what is optimised, in what steps, and on what."""

    workers: int = Field(default=1, gt=0)
    """Training processes (one per GPU). The result does not depend on it."""

    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """Default: 1 where the machine that runs the command has CUDA, 0 otherwise."""

    objective: Objective = SigmoidObjective()

    epochs: int = Field(default=1, gt=0)
    """Passes over the training groups; not used where `steps` is given."""

    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; passes begin again as often as needed."""

    groups_per_step: int = Field(default=64, gt=0)
    """Preference groups (pairs) of one optimizer step, over all workers."""

    tokens_per_micro_batch: int = Field(default=8192, gt=0)
    """Most tokens in one forward pass of one worker: bounds memory, never changes the result."""

    optimizer: OptimizerConfig = OptimizerConfig()

    activation_checkpointing: Literal["none", "full"] = "none"
    """full: recompute each block in the backward pass; a third more compute, far less memory."""

    logprob_chunk_tokens: int = Field(default=1024, gt=0)
    """Completion tokens whose logits exist at one time."""

    eval_every_steps: int | None = Field(default=None, gt=0)
    """Held-out evaluation every N steps; null: only at the end."""

    checkpoint_every_steps: int | None = Field(default=100, gt=0)
    """null: only at the end."""

    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints kept while training runs: two, so that a damaged one has a predecessor."""

    max_failures: int = Field(default=3, ge=0)
    """Times the workers are started again from the newest checkpoint after one of them died."""
