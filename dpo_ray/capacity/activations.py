"""The memory of activations: how many bytes autograd saves in the forward pass for the backward pass.

The counts follow from the operations of transformers' decoders as this project runs them. `docs/capacity.md` lists
these operations with the tensors that each of them saves. The tests compare the sums with PyTorch's memory tracker.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray.config.train import LoraConfig

from .model_sizes import ModelSizes

FLOAT32_BYTES = 4
MASK_BYTES = 1  # per element of a dropout mask


@dataclass(frozen=True)
class Rows:
    """The numbers of tokens in one forward pass of one rank."""

    tokens: int  # tokens that go through the blocks
    keys: int  # keys that attention gathers; the keys of a prompt count once for each completion
    scored: int  # completion tokens, which go through the head

    @classmethod
    def of(cls, tokens: int, prompt_share: float, completions: float, layout: str) -> Rows:
        """Estimate the numbers for a micro-batch of `tokens` tokens; a share of `prompt_share` are prompt tokens."""
        prompts = tokens * prompt_share
        scored = tokens - prompts
        if layout != "shared":  # each completion has its own copy of the prompt, and keys are not gathered
            return cls(round(prompts * completions + scored), round(prompts * completions + scored), round(scored))
        return cls(tokens, round(tokens + prompts * completions), round(scored))


@dataclass(frozen=True)
class BlockActivations:
    """The bytes of activations of one transformer block for one micro-batch."""

    input: int
    saved: int  # saved by autograd without checkpointing
    products: (
        int  # results of matrix products and attention, which selective checkpointing keeps in addition to the input
    )
    products_also_saved: int  # the part of `products` that autograd saves in any case
    products_taken_early: (
        int  # the part of `products` that recomputation has used and freed when the block's backward pass begins
    )
    feed_forward_gradients: int  # in addition to what is saved, at the peak of the backward pass

    def kept(self, checkpointing: str) -> int:
        """Return the bytes that the block keeps from the forward pass to its backward pass."""
        return {"none": self.saved, "selective": self.input + self.products, "full": self.input}[checkpointing]

    def recomputed(self, checkpointing: str) -> int:
        """Return the bytes that checkpointing computes again in the block's backward pass, in addition to `kept`."""
        match checkpointing:
            case "full":
                return self.saved
            case "selective":
                return self.saved - self.products_also_saved
            case _:
                return 0


def block_activations(
    sizes: ModelSizes, rows: Rows, value_bytes: int, lora: LoraConfig | None = None
) -> BlockActivations:
    """Compute the bytes of activations of one transformer block.

    Args:
        value_bytes: The bytes of one number in the forward pass: 2 in bfloat16, 4 in float32.
    """
    v, tokens = value_bytes, rows.tokens
    hidden, queries, keys = sizes.hidden * tokens, sizes.query_width * tokens, sizes.kv_width * tokens
    wide = sizes.intermediate * tokens * max(1, sizes.experts_per_token)
    saved = _norms(sizes, hidden, queries + keys, v, trained=lora is None)
    # Attention: queries, gathered keys and values, its result, and a float32 logsumexp for each head.
    statistics = FLOAT32_BYTES * sizes.heads * tokens
    saved += v * (2 * queries + 2 * sizes.kv_width * rows.keys) + statistics
    if v == FLOAT32_BYTES:
        saved += (
            v * queries
        )  # without the half-precision kernel the results of segments are concatenated, which is a second copy
    # Feed-forward: down(act(gate) * up). Autograd saves gate, act(gate), up, and their product.
    saved += v * 4 * wide
    if sizes.experts:  # tokens are copied for each of their experts, and the results are weighted
        saved += v * 2 * hidden * sizes.experts_per_token
    products = v * (2 * queries + 2 * keys + hidden + 2 * wide + hidden * max(1, sizes.experts_per_token)) + statistics
    adapters, adapter_products = _adapters(sizes, tokens, v, lora)
    return BlockActivations(
        input=v * hidden,
        saved=saved + adapters,
        products=products + adapter_products,
        products_also_saved=v * (queries + 2 * wide) + statistics,
        products_taken_early=v * (queries + 2 * keys + hidden),
        # The gradients of product, act(gate) and up exist at the same time, when the product itself has been freed.
        feed_forward_gradients=v * 2 * wide,
    )


def _norms(sizes: ModelSizes, hidden: int, heads: int, v: int, *, trained: bool) -> int:
    """Count the bytes that RMS norms save: their input in float32, the normalised input (for the weight's gradient), and
    their result.

    The norms of Gemma multiply by their weight in float32. Two kinds of results are not saved. The result of a norm
    after attention or feed-forward (the third and fourth norm of a block) is only added to the residual. The result of
    a norm of heads is rotated by its position (RoPE), and only the rotated result is saved.
    """
    scaled = FLOAT32_BYTES if sizes.gemma_norms else v
    per_value = FLOAT32_BYTES + (scaled if trained else 0)
    return sizes.norms * per_value * hidden + 2 * v * hidden + (per_value * heads if sizes.head_norms else 0)


def _adapters(sizes: ModelSizes, tokens: int, v: int, lora: LoraConfig | None) -> tuple[int, int]:
    """Return the bytes that autograd saves for a block's LoRA adapters, and the bytes of their matrix products.

    Each layer with an adapter saves its low-rank result and, with dropout, a copy of its input and the dropout mask.
    With dropout, the backward pass does not need the original input of the layer. This input is counted anyway, so the
    estimate is slightly too high.
    """
    if lora is None:
        return 0, 0
    layers = adapted(sizes, lora)
    saved = sum(v * lora.rank + ((v + MASK_BYTES) * wide if lora.dropout else 0) for wide, _ in layers)
    return saved * tokens, sum(v * (lora.rank + out) for _, out in layers) * tokens


def adapted(sizes: ModelSizes, lora: LoraConfig) -> list[tuple[int, int]]:
    """List the shapes [in, out] of a block's linear layers that get an adapter. Experts have no linear layers."""
    named = sizes.linear_layers
    targets = list(named) if lora.target_modules == "all-linear" else [n for n in named if n in lora.target_modules]
    return [named[name] for name in targets]


def between_blocks_bytes(sizes: ModelSizes, rows: Rows, value_bytes: int) -> int:
    """Return the bytes of the cosines and sines of positions (RoPE), which all blocks use until the backward pass ends."""
    return 2 * rows.tokens * sizes.head_dim * value_bytes


def after_blocks_bytes(sizes: ModelSizes, rows: Rows, value_bytes: int) -> int:
    """Return the bytes that the last norm and the head keep for the backward pass, without the logits."""
    norm = (FLOAT32_BYTES + (FLOAT32_BYTES if sizes.gemma_norms else value_bytes)) * rows.tokens * sizes.hidden
    return norm + value_bytes * rows.scored * sizes.hidden
