"""The recipe section `train`: objective, batch, optimizer, hardware and checkpoints of the training."""

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
"""Bytes of optimizer state per trained parameter, by the type of the optimizer."""


class OptimizerConfig(StrictModel):
    """The optimizer, and the learning rate over time: a warm-up and a decay."""

    type: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "rmsprop", "adafactor"] = "adamw"
    """..._8bit: the state needs a quarter of AdamW's memory. paged_...: the state moves between GPU and CPU memory as
    space allows. ..._8bit and paged_... use bitsandbytes. rmsprop: the optimizer of the DPO paper; its state has half
    the size of AdamW's. adafactor: almost no state. Its learning rate is relative to the size of the weights, so use a
    larger learning rate, such as 1e-4."""

    learning_rate: float = Field(default=5e-7, gt=0, le=100)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """The two betas of AdamW; RMSprop uses the second one as its smoothing constant. Adafactor ignores `betas` and `eps`
    and uses torch's defaults."""

    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients with a larger global norm are scaled down to this norm; null: they are never scaled."""

    decay: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up. With cosine, linear and wsd (warm-up, stable, decay) it ends at 0."""

    decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """wsd only: share of the steps in the final phase, in which the learning rate falls linearly to 0."""

    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of steps of the warm-up. If it is set, warmup_fraction is ignored."""


class ShardingConfig(StrictModel):
    """How FSDP2 shards weights, gradients and optimizer state over the workers."""

    mode: Literal["full", "hybrid"] = "full"
    """full: all workers together hold one copy. hybrid (HSDP): every `shard_workers` workers together hold one copy; use
    it if the workers are on several nodes."""

    shard_workers: int | None = Field(default=None, gt=0)
    """hybrid only: number of workers that together hold one copy, usually the number of GPUs of a node."""

    cpu_offload: bool = False
    """Keep shards and optimizer state in CPU memory. This is slow, so use it only if the model does not fit otherwise."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ShardingConfig:
        if (self.mode == "hybrid") != (self.shard_workers is not None):
            raise field_error("shard_workers", "is required for mode=hybrid, and not allowed otherwise")
        return self


class LoraConfig(StrictModel):
    """LoRA (with PEFT): train a low-rank adapter, and freeze the model itself. Hu et al. 2021 (2106.09685)."""

    rank: int = Field(default=16, gt=0, le=100_000)
    alpha: float = Field(default=16, gt=0)
    """The adapter's product is scaled by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input, only in training. If it is above 0, the loss and log-probs of a training step
    include the dropout."""

    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, such as q_proj. all-linear: all linear layers except the head."""

    merge: bool = False
    """true: export the model with the adapter added to its weights. false: export only the adapter."""


class BestConfig(StrictModel):
    """Early stopping: keep the weights of the best evaluation, and stop when evaluations no longer improve."""

    metric: str = "eval_rewards/accuracies"
    """Name of an evaluation metric, such as eval_loss, eval_rewards/margins, or eval_NAME_loss for a named held-out set."""

    mode: Literal["max", "min"] = "max"
    patience: int | None = Field(default=None, gt=0)
    """End training after this many evaluations in a row without improvement; null: never."""


class TrainConfig(StrictModel):
    """The settings of training: objective, steps, optimizer, workers, evaluations and checkpoints."""

    workers: int = Field(default=1, gt=0, le=MOST_PROCESSES)
    """Number of training processes (one per GPU). The result does not depend on this number. `cluster.roles.train` sets
    what each process requests."""

    min_workers: int | None = Field(default=None, gt=0)
    """Smallest number of workers that may train if nodes are lost or the cluster has too few free resources. As soon as
    possible, training uses more workers again. The contents of the steps do not change. Default: the value of
    `workers`, so training waits until all workers can run."""

    objective: Objective = SigmoidObjective()
    shaping: ShapingConfig = ShapingConfig()

    epochs: int = Field(default=1, gt=0, le=1_000_000)
    """Number of passes over the training data. It is ignored if `steps` is set."""

    steps: int | None = Field(default=None, gt=0, le=MOST_STEPS)
    """Number of optimizer steps; the training data is repeated as often as needed. null: `epochs` decides."""

    groups_per_step: int = Field(default=64, gt=0, le=10_000_000)
    """Number of preference groups (usually pairs) in one optimizer step, over all workers."""

    tokens_per_micro_batch: int = Field(default=8192, gt=0, le=MOST_TOKENS)
    """Largest number of tokens in one forward pass of one worker. This limits the memory, and does not change the
    result."""

    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights; null: train all weights."""

    quantization: Literal["nf4"] | None = None
    """nf4: store each frozen weight in 4 bits (QLoRA, by bitsandbytes); each worker holds a full copy. This needs
    train.lora. Policy and reference both use the 4-bit weights, so the trainer must compute the reference's log-probs.
    Only the adapter is exported."""

    layout: Literal["shared", "packed", "padded"] = "shared"
    """shared: compute a prompt once for all its completions. packed: compute the prompt again for each completion,
    without padding. padded: like packed, but pad all rows to equal length. The results are the same. If a model does
    not support shared, another layout is used, and a log line reports it."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again, so that less memory is needed. full: all of each transformer block, which
    needs a third more compute and much less memory. selective: each block except its matrix products and its
    attention."""

    compile: bool = False
    """Compile each block with torch.compile. This takes about a minute and makes training on GPUs faster."""

    router_aux_loss: float = Field(default=0.001, ge=0)
    """Mixture-of-experts models only: weight of the auxiliary loss that balances the load of the experts."""

    logprob_chunk_tokens: int = Field(default=1024, gt=0, le=MOST_TOKENS)
    """Number of completion tokens whose logits are in memory at the same time."""

    entropy_every_steps: int | None = Field(default=10, gt=0)
    """Measure the policy's entropy every N steps. Each measurement needs a further pass over the logits. null: only at
    evaluations."""

    eval_every_steps: int | None = Field(default=None, gt=0)
    """Evaluate on the held-out data every N steps; null: only at the end."""

    best: BestConfig | None = None
    """Export the weights of the best evaluation; null: export the weights of the last step."""

    checkpoint_every_steps: int | None = Field(default=100, gt=0)
    """Write a checkpoint every N steps; null: only at the end."""

    keep_checkpoints: int = Field(default=2, ge=2, le=1_000_000)
    """How many of the newest checkpoints are kept during training. At least 2, in case one of them is damaged."""

    max_failures: int = Field(default=3, ge=0, le=1_000_000)
    """How often the workers may be restarted from the newest checkpoint after one of them has died."""

    hang_seconds: float = Field(default=1800, gt=0, le=MOST_SECONDS)
    """If a collective operation of the workers takes longer than this, the workers are treated as hung and are
    restarted."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if self.best is not None and self.eval_every_steps is None:
            raise field_error("best", "there are no evaluations to compare: set train.eval_every_steps")
        if self.quantization is not None and (self.lora is None or self.lora.merge or self.sharding.cpu_offload):
            raise field_error(
                "quantization",
                "needs an adapter to train: set train.lora, with merge=false, and set train.sharding.cpu_offload=false",
            )
        shard = self.sharding.shard_workers
        if shard is not None and self.workers % shard:
            raise field_error("sharding.shard_workers", f"{shard} does not divide train.workers={self.workers}")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise field_error("min_workers", f"{self.min_workers} is more than workers={self.workers}")
        if self.min_workers is not None and shard is not None and self.min_workers < shard:
            raise field_error(
                "min_workers", f"fewer workers than shard_workers={shard} cannot hold the model: increase min_workers"
            )
        for field, problem in self.shaping.problems(self.objective):
            raise field_error(f"shaping.{field}", problem)
        return self
