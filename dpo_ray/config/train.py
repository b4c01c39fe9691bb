"""How the policy is trained: objective, batch, optimizer, hardware, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import StrictModel, field_error
from .objective import Objective, ShapingConfig, SigmoidObjective
from .roles import NodeLabels

Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictModel):
    """The optimizer, and the learning rate over time: a warm-up and a decay."""

    type: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "rmsprop", "adafactor"] = "adamw"
    """8bit: a quarter of AdamW's state; paged: its state moves between GPU and CPU memory as there is room (both by
    bitsandbytes). rmsprop: the DPO paper's, with half of AdamW's state. adafactor: next to no state; its learning rate is
    relative to the size of a weight, so take a larger one, such as 1e-4."""

    learning_rate: float = Field(default=5e-7, gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW's; the second is RMSprop's smoothing as well. Adafactor has its own, as torch sets them, and its own eps."""

    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; null: never."""

    decay: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; cosine, linear and wsd (warm-up, stable, decay) end at 0."""

    decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """wsd only: share of the steps, at the end, in which the rate falls linearly to 0."""

    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of the warm-up, in place of warmup_fraction."""


class ShardingConfig(StrictModel):
    """How FSDP2 spreads weights, gradients and optimizer state over the workers."""

    mode: Literal["full", "hybrid"] = "full"
    """full: over all workers. hybrid (HSDP): over `shard_workers`, replicated between such sets; use it across nodes."""

    shard_workers: int | None = Field(default=None, gt=0)
    """hybrid only: workers that share one copy, as many as a node has GPUs."""

    cpu_offload: bool = False
    """Keep shards and optimizer state in CPU memory; slow, and the last resort where nothing else fits."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ShardingConfig:
        if (self.mode == "hybrid") != (self.shard_workers is not None):
            raise field_error("shard_workers", "is needed for mode=hybrid, and for nothing else")
        return self


class LoraConfig(StrictModel):
    """Train a low-rank adapter of the model, and leave the model itself as it is (PEFT). Hu et al. 2021 (2106.09685)."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=16, gt=0)
    """The adapter's product is scaled by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input, in training alone. Above 0, loss and log-probs of a step are those of a thinned network."""

    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get one, such as q_proj; all-linear: all but the head."""

    merge: bool = False
    """Export the model with the adapter added to its weights, instead of the adapter alone."""


class BestConfig(StrictModel):
    """Keep the weights of the evaluation that was best, and stop when none gets better."""

    metric: str = "eval_rewards/accuracies"
    """A name of the evaluation's figures: eval_loss, eval_rewards/margins, eval_NAME_loss of a named set, ..."""

    mode: Literal["max", "min"] = "max"
    patience: int | None = Field(default=None, gt=0)
    """End training after so many evaluations in a row without a better one; null: never."""


class TrainConfig(StrictModel):
    """Say what is optimised, in what steps, and on what."""

    workers: int = Field(default=1, gt=0)
    """Training processes (one per GPU). The result does not depend on it."""

    min_workers: int | None = Field(default=None, gt=0)
    """Where nodes are lost, or the cluster has not room for all: train with as few as this, and with more again once there
    is room. The steps are the same. Default: workers, and training waits until all have a place."""

    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """Default: 1 where the machine that runs the command, or the cluster that `ray.address` names, has GPUs; 0 otherwise."""

    memory_gib_per_worker: float | None = Field(default=None, gt=0)
    """Memory that Ray sets aside for each worker."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Place workers only on nodes with these Ray labels, such as {dpo/role: train}."""

    objective: Objective = SigmoidObjective()
    shaping: ShapingConfig = ShapingConfig()

    epochs: int = Field(default=1, gt=0)
    """Passes over the training groups; not used where `steps` is given."""

    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; passes begin again as often as needed."""

    groups_per_step: int = Field(default=64, gt=0)
    """Preference groups (pairs) of one optimizer step, over all workers."""

    tokens_per_micro_batch: int = Field(default=8192, gt=0)
    """Most tokens in one forward pass of one worker: bounds memory, never changes the result."""

    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights; null: all weights."""

    quantization: Literal["nf4"] | None = None
    """nf4: the frozen weights under train.lora take 4 bits each (QLoRA, by bitsandbytes), on every worker alike. Policy and
    reference are then both of these weights, so the trainer scores the reference, and the adapter is exported alone."""

    layout: Literal["shared", "packed", "padded"] = "shared"
    """shared: a prompt is computed once for all its completions. packed: once for each, without padding. padded: rows of one
    length. The same result; a model that shared cannot serve falls back by itself, with a line that says so."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: recompute each block in the backward pass, a third more compute for far less memory. selective: recompute all but
    the matrix products and attention of each block."""

    compile: bool = False
    """torch.compile each block: faster on GPUs, after a minute of compiling."""

    router_aux_loss: float = Field(default=0.001, ge=0)
    """Mixture-of-experts models only: weight of the loss that keeps their experts evenly used."""

    logprob_chunk_tokens: int = Field(default=1024, gt=0)
    """Completion tokens whose logits exist at one time."""

    entropy_every_steps: int | None = Field(default=10, gt=0)
    """Measure the policy's entropy every N steps, as it costs a pass over the logits; null: at evaluations only."""

    eval_every_steps: int | None = Field(default=None, gt=0)
    """Held-out evaluation every N steps; null: only at the end."""

    best: BestConfig | None = None
    """Export the weights of the best evaluation; null: those of the last step."""

    checkpoint_every_steps: int | None = Field(default=100, gt=0)
    """null: only at the end."""

    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints kept while training runs: two, so that a damaged one has a predecessor."""

    max_failures: int = Field(default=3, ge=0)
    """Times the workers are started again from the newest checkpoint after one of them died."""

    hang_seconds: float = Field(default=1800, gt=0)
    """A collective operation that takes longer counts as hung: the workers are started again."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if self.best is not None and self.eval_every_steps is None:
            raise field_error("best", "needs evaluations to compare: set train.eval_every_steps")
        if self.quantization is not None and (self.lora is None or self.lora.merge or self.sharding.cpu_offload):
            raise field_error(
                "quantization",
                "needs an adapter to train: set train.lora, without merge; not with sharding.cpu_offload",
            )
        shard = self.sharding.shard_workers
        if shard is not None and self.workers % shard:
            raise field_error("sharding.shard_workers", f"{shard} does not divide train.workers={self.workers}")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise field_error("min_workers", f"at most workers={self.workers} is expected")
        if self.min_workers is not None and shard is not None and self.min_workers < shard:
            raise field_error("min_workers", f"fewer than shard_workers={shard} do not hold the model: raise it")
        for field, problem in self.shaping.problems(self.objective):
            raise field_error(f"shaping.{field}", problem)
        return self
