"""The head of the language model: computes log-probs of target tokens without a matrix of all logits [rows, vocabulary].

Logits exist only for one chunk of rows at a time, in the forward and in the backward pass. The backward pass computes the
logits again from the hidden states, except those of the last chunk, which are still in memory. The weight gradient is the sum
over the chunks. This follows cut cross-entropy (Wijmans et al. 2024, 2411.09009).

`torch.nn.functional.linear_cross_entropy` does the same for plain float32 heads. It is not used here, because this function:
- rounds log-probs to the weights' type; in bfloat16 two or three digits remain, too few for differences of sums
- supports no soft caps, scales or entropies
- is not faster (`benchmarks/head.py`)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VOCABULARY_BLOCK = 16_384  # rows of the weight whose gradient is converted to float32 at a time


class HeadScores(NamedTuple):
    """The scores of each row, [rows] in float32 (float64 for a float64 model). Only `logps` has a gradient."""

    logps: Tensor
    entropy: Tensor | None
    log_collision: Tensor | None  # log of the sum over the vocabulary of p^2


def head_scores(
    hidden: Tensor,  # [rows, hidden]
    weight: Tensor,  # [vocabulary, hidden], of the type of `hidden`
    bias: Tensor | None,  # [vocabulary]
    target: Tensor,  # int64 [rows]
    chunk_tokens: int,
    scale: float = 1.0,
    softcap: float | None = None,
    *,
    with_statistics: bool = False,
) -> HeadScores:
    """Compute the log-prob of each row's target under softmax(logits), logits = softcap * tanh(scale * (W h + b) / softcap).

    The softmax is computed in float32 for all types of weights. If there are no rows, the weight's gradient is zero and not
    None, so that all ranks of a sharded model reduce the same gradients.
    """
    return HeadScores(*_Head.apply(hidden, weight, bias, target, chunk_tokens, scale, softcap, with_statistics))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        chunk_tokens: int,
        scale: float,
        softcap: float | None,
        with_statistics: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        buffer = _buffer(hidden, weight, chunk_tokens)
        logps, largest, total = (buffer.new_empty(len(target)) for _ in range(3))
        entropy, collision = (buffer.new_empty(len(target)) if with_statistics else None for _ in range(2))
        for start in range(0, len(target), chunk_tokens):
            at = slice(start, start + chunk_tokens)
            logits = _logits(buffer, hidden[at], weight, bias, scale, softcap)  # [chunk, vocabulary]
            own = logits.gather(1, target[at, None])[:, 0]
            largest[at] = logits.amax(dim=1)
            logits.sub_(largest[at, None]).exp_()
            total[at] = logits.sum(dim=1)
            logps[at] = own - (total[at].log() + largest[at])
            if entropy is not None and collision is not None:
                entropy[at] = torch.special.entr(logits).sum(dim=1) / total[at] + total[at].log()
                collision[at] = 2 * (torch.linalg.vector_norm(logits, dim=1).log() - total[at].log())
        ctx.save_for_backward(hidden, weight, bias, target, largest, total)
        ctx.chunk_tokens, ctx.scale, ctx.softcap = chunk_tokens, scale, softcap
        ctx.last = buffer if any(ctx.needs_input_grad) and softcap is None else None
        ctx.mark_non_differentiable(*(t for t in (entropy, collision) if t is not None))
        return logps, entropy, collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, largest, total = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        last, ctx.last = ctx.last, None  # it is overwritten: a second backward pass recomputes it
        buffer = _buffer(hidden, weight, ctx.chunk_tokens) if last is None else last
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=buffer.dtype) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=buffer.dtype) if for_bias else None
        for start in reversed(range(0, len(target), ctx.chunk_tokens)):
            at = slice(start, start + ctx.chunk_tokens)
            slope = None
            if last is not None:
                g, last = last[: len(target) - start], None
            else:
                g = _logits(buffer, hidden[at], weight, bias, ctx.scale, ctx.softcap)
                if ctx.softcap is not None:
                    slope = (g / ctx.softcap).square_().neg_().add_(1)
                g.sub_(largest[at, None]).exp_()  # as in forward, so that a row's gradient does not depend on its chunk
            g.mul_((-grad[at] / total[at])[:, None])
            g.scatter_add_(1, target[at, None], grad[at, None].to(g.dtype))  # [chunk, vocabulary]: w.r.t. the logits
            if slope is not None:
                g.mul_(slope)
            if ctx.scale != 1.0:
                g.mul_(ctx.scale)
            if grad_bias is not None:
                grad_bias += g.sum(dim=0)
            g = g.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[at] = g @ weight
            if grad_weight is not None:
                _add_product(grad_weight, g.t(), hidden[at])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _buffer(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    """Allocate memory for the logits of one chunk.

    All chunks use the same memory, because an allocation for each chunk would cost page faults on CPUs.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(min(chunk_tokens, len(hidden)), len(weight), dtype=dtype)


def _logits(
    buffer: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Compute the logits of one chunk in the dtype of the buffer, without converting the weight to this dtype."""
    logits = buffer[: len(hidden)]
    if hidden.dtype == buffer.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.is_cuda:  # the kernel accumulates in float32 and writes that without rounding
        torch.mm(hidden, weight.t(), out_dtype=buffer.dtype, out=logits)
    else:
        logits.copy_(torch.mm(hidden, weight.t()))
    if bias is not None:
        logits.add_(bias)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` [vocabulary, hidden]. `total` may be float32 when `left` and `right` are bfloat16."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
        return
    for start in range(0, len(total), VOCABULARY_BLOCK):
        at = slice(start, start + VOCABULARY_BLOCK)
        if right.is_cuda:
            total[at] += torch.mm(left[at], right, out_dtype=total.dtype)
        else:
            total[at] += torch.mm(left[at], right)
