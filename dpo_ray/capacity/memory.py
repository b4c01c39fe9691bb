"""The GPU memory of one training rank during a step. Its peak may be in the head, in any block, or in the optimizer.

Each rank keeps a shard of the weights, gradients and optimizer state, in float32 (`models/sharding.py`). Whole weights
are gathered in the data type of the forward pass. The weights of a block are gathered while that block or the previous
block is computed. The weights of the root (embedding, last norm, head) are gathered from the start of the forward pass
to the end of the backward pass.

Gradients are reduced once per step, after its last micro-batch (`train/step.py`). If a rank has more than one
micro-batch, it holds the gradients of the whole model until then, unsharded and in float32. These gradients take four
bytes per trained parameter, whatever the number of ranks is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dpo_ray.config.train import STATE_BYTES, LoraConfig, TrainConfig

from .activations import FLOAT32_BYTES, Rows, adapted, after_blocks_bytes, between_blocks_bytes, block_activations
from .model_sizes import ModelSizes

NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # 4 bits, one byte for every 64 weights, a float32 for every 256 of these bytes
HEAD_BLOCK_ROWS = 16_384  # `models/head.py`: the rows of the head's gradient that are converted at a time


@dataclass(frozen=True)
class Setup:
    """Everything that the memory of one training rank depends on."""

    sizes: ModelSizes
    train: TrainConfig
    shard_ranks: int  # the ranks that share one copy of the weights
    value_bytes: int  # the bytes of a number in the forward pass
    rows: Rows
    micro_batches: int  # of a rank in a step; with more than one, however many, gradients are held whole


@dataclass(frozen=True)
class Parts:
    """The GPU memory of one training rank at one moment of a step, in bytes by purpose."""

    weights: float = 0
    optimizer: float = 0
    gradients: float = 0  # shards
    whole_gradients: float = 0  # gradients of micro-batches that are not reduced yet
    gathered: float = 0
    activations: float = 0
    logits: float = 0  # of one chunk
    work: float = 0  # the block or head being computed: recomputation, gradients not reduced yet, buffers of reductions

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RankMemory:
    """The GPU memory of a rank at its peak, and the bytes that the rank keeps in CPU memory."""

    peak: Parts
    moment: str
    host_bytes: float  # shards and state that are offloaded or paged


@dataclass(frozen=True)
class Weights:
    """The numbers of parameters, all and trained ones, of a block and of the root (embedding, last norm, head)."""

    block: int  # the sharded parameters of one block
    block_trained: int
    root: int
    root_trained: int
    quantized: int  # the quantized parameters of one block, whole on every rank

    @classmethod
    def of(cls, sizes: ModelSizes, train: TrainConfig) -> Weights:
        """Count the parameters of a model under the settings of `train` (all weights, LoRA, or quantized with LoRA)."""
        if train.lora is None:
            return cls(sizes.block_parameters, sizes.block_parameters, sizes.root_parameters, sizes.root_parameters, 0)
        own = adapter_parameters(sizes, train.lora)
        linear = sum(a * b for a, b in sizes.linear_layers.values()) if train.quantization else 0
        return cls(sizes.block_parameters - linear + own, own, sizes.root_parameters, 0, linear)

    def trained(self, layers: int) -> int:
        """Count all trained parameters of a model with this number of layers."""
        return layers * self.block_trained + self.root_trained


def adapter_parameters(sizes: ModelSizes, lora: LoraConfig) -> int:
    """Count the parameters of a LoRA adapter in one block: A [rank, in] and B [out, rank] for each adapted layer."""
    return sum(lora.rank * (a + b) for a, b in adapted(sizes, lora))


def training_memory(setup: Setup) -> RankMemory:
    """Compute a rank's memory at each moment of a step, and return the memory at the moment with the largest total."""
    sizes, train = setup.sizes, setup.train
    weights = Weights.of(sizes, train)
    trained = weights.trained(sizes.layers)
    stored = FLOAT32_BYTES * (sizes.layers * weights.block + weights.root) / setup.shard_ranks
    quantized = NF4_BYTES * weights.quantized * sizes.layers
    state = STATE_BYTES[train.optimizer.type] * trained / setup.shard_ranks
    on_host = 0.0
    if train.sharding.cpu_offload:
        on_host, stored, state = stored + state + FLOAT32_BYTES * trained / setup.shard_ranks, 0.0, 0.0
    elif train.optimizer.type.startswith("paged"):
        on_host, state = state, 0.0
    fixed = Parts(weights=stored + quantized, optimizer=state)
    moments = [*_moments(setup, weights, fixed)]
    moments.append(("the optimizer's step", _optimizer_step(setup, trained, fixed)))
    moment, peak = max(moments, key=lambda m: m[1].total)
    return RankMemory(peak, moment, on_host)


def _moments(setup: Setup, weights: Weights, fixed: Parts):
    """Yield the moments of the last micro-batch's backward pass that may need most memory, as (name, memory)."""
    sizes, train, rows, v = setup.sizes, setup.train, setup.rows, setup.value_bytes
    block = block_activations(sizes, rows, v, train.lora)
    kept, layers = block.kept(train.activation_checkpointing), sizes.layers
    outside, chunk = between_blocks_bytes(sizes, rows, v), min(train.logprob_chunk_tokens, rows.scored)
    root_gathered, block_gathered = v * weights.root, v * weights.block
    whole = FLOAT32_BYTES if setup.micro_batches > 1 else 0
    shard = 0 if train.sharding.cpu_offload else FLOAT32_BYTES / setup.shard_ranks
    # Backward pass of the head: its gradient in float32 and in the weights' type (or a block of products), those of a
    # chunk and of the scored rows. The weights of the first block are already being gathered.
    head = v * chunk * sizes.vocabulary + v * rows.scored * sizes.hidden
    if weights.root_trained:
        products = FLOAT32_BYTES * min(HEAD_BLOCK_ROWS, sizes.vocabulary) * sizes.hidden
        head += FLOAT32_BYTES * sizes.head_parameters
        head += max(v * sizes.head_parameters, products) if v < FLOAT32_BYTES else 0
    yield (
        "the head's backward pass",
        _plus(
            fixed,
            whole_gradients=whole * weights.trained(layers),
            gathered=root_gathered + block_gathered,
            activations=layers * kept + outside + after_blocks_bytes(sizes, rows, v),
            logits=FLOAT32_BYTES * chunk * sizes.vocabulary,
            work=head,
        ),
    )
    # Backward pass of a block: the head's gradient is still held, and so is that of the residual.
    waiting = (v * sizes.head_parameters if weights.root_trained else 0) + v * rows.tokens * sizes.hidden
    at_work = block.recomputed(train.activation_checkpointing) + block.feed_forward_gradients
    if train.lora is None or train.quantization:  # the gradient of a weight, or a dequantized weight
        at_work += v * sizes.intermediate * sizes.hidden
    taken = block.products_taken_early if train.activation_checkpointing == "selective" else 0
    for i in reversed(range(layers)):
        reduced = layers - 1 - i
        gathered = root_gathered + block_gathered * (2 if i else 1)
        sharded = shard * reduced * weights.block_trained
        unreduced = whole * ((i + 1) * weights.block_trained + weights.root_trained)
        sending = FLOAT32_BYTES * weights.block_trained if reduced else 0
        yield (
            f"the backward pass of block {i + 1} of {layers}",
            _plus(
                fixed,
                gradients=sharded,
                whole_gradients=unreduced,
                gathered=gathered,
                activations=(i + 1) * kept + outside - taken,
                work=waiting + at_work + sending,
            ),
        )
        yield (  # the weights of the block are freed before
            f"the reduction of block {i + 1} of {layers}",
            _plus(
                fixed,
                gradients=sharded + shard * weights.block_trained,
                whole_gradients=unreduced,
                gathered=gathered - block_gathered,
                activations=i * kept + outside,
                work=waiting + (FLOAT32_BYTES + (0 if whole else v)) * weights.block_trained,
            ),
        )
    yield (
        "the reduction of the embedding and the head",
        _plus(
            fixed,
            gradients=shard * weights.trained(layers),
            whole_gradients=whole * weights.root_trained,
            work=(FLOAT32_BYTES + (0 if whole else v)) * weights.root_trained,
        ),
    )


def _optimizer_step(setup: Setup, trained: int, fixed: Parts) -> Parts:
    """Return the memory during the optimizer's step.

    Most optimizers work in place. Adafactor gathers one whole parameter at a time, with its gradient and update, so the
    largest parameter counts.
    """
    sizes, work = setup.sizes, 0.0
    if setup.train.optimizer.type == "adafactor":
        largest = max(sizes.head_parameters, *(a * b for a, b in sizes.linear_layers.values()))
        if setup.train.lora is not None:
            largest = max(setup.train.lora.rank * max(a, b) for a, b in adapted(sizes, setup.train.lora))
        work = 3.0 * FLOAT32_BYTES * largest
    shard = 0 if setup.train.sharding.cpu_offload else FLOAT32_BYTES * trained / setup.shard_ranks
    return _plus(fixed, gradients=shard, work=work)


def _plus(parts: Parts, **more: float) -> Parts:
    return Parts(**{f.name: getattr(parts, f.name) + more.get(f.name, 0.0) for f in fields(Parts)})
