"""The section `train`: objective, batch, optimizer, hardware and checkpoints of the training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import MOST_PROCESSES, MOST_SECONDS, MOST_STEPS, MOST_TOKENS, StrictModel, field_error
from .objective import Objective, SigmoidObjective
from .shaping import ShapingConfig

Momentum = Annotated[float, Field(ge=0, lt=1)]

# Bytes per trained parameter, in float32 or as bitsandbytes' kernels keep it: one byte for each moment and a float32
# scale for every 256 of them (`train/optimizers/blockwise_adamw.py`).
STATE_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw": 8.0,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "rmsprop": 4.0,
    "adafactor": 0.0,
}
"""Of the optimizer's state, by its type."""


class OptimizerConfig(StrictModel):
    """The optimizer, and the learning rate over time: a warm-up and a decay."""

    type: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "rmsprop", "adafactor"] = "adamw"
    """8bit: a quarter of AdamW's state; paged: the state moves between GPU and CPU memory as space allows (both by
    bitsandbytes). rmsprop: the optimizer of the DPO paper, with half of AdamW's state. adafactor: almost no state; its
    learning rate is relative to the size of a weight, so use a larger one, such as 1e-4."""

    learning_rate: float = Field(default=5e-7, gt=0, le=100)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Betas of AdamW; the second is also the smoothing of RMSprop. Adafactor uses torch's defaults instead, also for
    eps."""

    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; null: never."""

    decay: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; cosine, linear and wsd (warm-up, stable, decay) end at 0."""

    decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """wsd only: share of the steps, at the end, in which the learning rate falls linearly to 0."""

    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of the warm-up; replaces warmup_fraction."""


class ShardingConfig(StrictModel):
    """How FSDP2 shards weights, gradients and optimizer state over the workers."""

    mode: Literal["full", "hybrid"] = "full"
    """full: over all workers. hybrid (HSDP): over sets of `shard_workers` workers, with a copy in each set; use it
    across nodes."""

    shard_workers: int | None = Field(default=None, gt=0)
    """hybrid only: workers that share one copy, usually the number of GPUs of a node."""

    cpu_offload: bool = False
    """Keep shards and optimizer state in CPU memory. This is slow: use it only if nothing else fits."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ShardingConfig:
        if (self.mode == "hybrid") != (self.shard_workers is not None):
            raise field_error("shard_workers", "is required for mode=hybrid, and not allowed otherwise")
        return self


class LoraConfig(StrictModel):
    """A low-rank adapter that is trained while the model itself is frozen (PEFT). Hu et al. 2021 (2106.09685)."""

    rank: int = Field(default=16, gt=0, le=100_000)
    alpha: float = Field(default=16, gt=0)
    """The adapter's product is scaled by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input, only in training. Above 0, loss and log-probs of a step are computed with
    dropout."""

    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, such as q_proj; all-linear: all except the head."""

    merge: bool = False
    """Export the model with the adapter added to its weights, instead of the adapter alone."""


class BestConfig(StrictModel):
    """Early stopping: keep the weights of the best evaluation, and stop when evaluations no longer improve."""

    metric: str = "eval_rewards/accuracies"
    """An evaluation metric: eval_loss, eval_rewards/margins, eval_NAME_loss of a named set, ..."""

    mode: Literal["max", "min"] = "max"
    patience: int | None = Field(default=None, gt=0)
    """End training after this many evaluations in a row without improvement; null: never."""


class TrainConfig(StrictModel):
    """What is optimised, in which steps, and on which hardware."""

    workers: int = Field(default=1, gt=0, le=MOST_PROCESSES)
    """Training processes (one per GPU); `cluster.roles.train` is what each requests. The result does not depend on
    it."""

    min_workers: int | None = Field(default=None, gt=0)
    """If nodes are lost or the cluster has too few free resources: train with as few workers as this, and with more
    again as soon as possible. The steps are the same. Default: workers, and training waits until all of them can
    run."""

    objective: Objective = SigmoidObjective()
    shaping: ShapingConfig = ShapingConfig()

    epochs: int = Field(default=1, gt=0, le=1_000_000)
    """Passes over the training groups; not used if `steps` is set."""

    steps: int | None = Field(default=None, gt=0, le=MOST_STEPS)
    """Optimizer steps; the training groups are repeated as often as needed."""

    groups_per_step: int = Field(default=64, gt=0, le=10_000_000)
    """Preference groups (pairs) of one optimizer step, summed over all workers."""

    tokens_per_micro_batch: int = Field(default=8192, gt=0, le=MOST_TOKENS)
    """Maximum number of tokens in one forward pass of one worker: it limits memory and never changes the result."""

    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights; null: train all weights."""

    quantization: Literal["nf4"] | None = None
    """nf4: store the frozen weights under train.lora in 4 bits each (QLoRA, by bitsandbytes), as a full copy on every
    worker. Policy and reference then both use these weights, so the trainer scores the reference, and only the adapter
    is exported."""

    layout: Literal["shared", "packed", "padded"] = "shared"
    """shared: compute a prompt once for all its completions. packed: once for each completion, without padding. padded:
    rows of equal length. The results are the same. A model that does not support shared uses another layout, with a log
    line."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: recompute each block in the backward pass: a third more compute for much less memory. selective: recompute
    everything except the matrix products and attention of each block."""

    compile: bool = False
    """Compile each block with torch.compile: faster on GPUs, after about a minute of compilation."""

    router_aux_loss: float = Field(default=0.001, ge=0)
    """Mixture-of-experts models only: weight of the auxiliary loss that balances the load of the experts."""

    logprob_chunk_tokens: int = Field(default=1024, gt=0, le=MOST_TOKENS)
    """Completion tokens whose logits are in memory at the same time."""

    entropy_every_steps: int | None = Field(default=10, gt=0)
    """Measure the policy's entropy every N steps, as it costs a pass over the logits; null: only at evaluations."""

    eval_every_steps: int | None = Field(default=None, gt=0)
    """Held-out evaluation every N steps; null: only at the end."""

    best: BestConfig | None = None
    """Export the weights of the best evaluation; null: export those of the last step."""

    checkpoint_every_steps: int | None = Field(default=100, gt=0)
    """Write a checkpoint every N steps; null: only at the end."""

    keep_checkpoints: int = Field(default=2, ge=2, le=1_000_000)
    """How many of the newest checkpoints are kept during training: at least two, in case one is damaged."""

    max_failures: int = Field(default=3, ge=0, le=1_000_000)
    """How often the workers are restarted from the newest checkpoint after one of them has died."""

    hang_seconds: float = Field(default=1800, gt=0, le=MOST_SECONDS)
    """A collective operation that takes longer than this counts as hung, and the workers are restarted."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if self.best is not None and self.eval_every_steps is None:
            raise field_error("best", "needs evaluations to compare: set train.eval_every_steps")
        if self.quantization is not None and (self.lora is None or self.lora.merge or self.sharding.cpu_offload):
            raise field_error(
                "quantization",
                "needs an adapter to train: set train.lora, without merge and without sharding.cpu_offload",
            )
        shard = self.sharding.shard_workers
        if shard is not None and self.workers % shard:
            raise field_error("sharding.shard_workers", f"{shard} does not divide train.workers={self.workers}")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise field_error("min_workers", f"at most workers={self.workers} is expected")
        if self.min_workers is not None and shard is not None and self.min_workers < shard:
            raise field_error(
                "min_workers", f"fewer workers than shard_workers={shard} cannot hold the model: increase it"
            )
        for field, problem in self.shaping.problems(self.objective):
            raise field_error(f"shaping.{field}", problem)
        return self
