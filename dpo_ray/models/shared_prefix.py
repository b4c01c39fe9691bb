"""Attention over packed groups by KV expansion: a prompt's keys and values serve all of its completions.

Queries are cut into segments (each prompt, each completion). A completion's keys are its prompt's followed by its own,
bottom-right causal. No mask is built and every linear layer sees a prompt once. It is registered through transformers'
attention interface (https://huggingface.co/docs/transformers/attention_interface), so no model code is touched; an
implementation that is not registered for masks gets `attention_mask=None`, which is what keeps transformers from reading
the restart of `position_ids` as the start of a new sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface

from .segment_index import SegmentIndex

IMPLEMENTATION = "dpo_ray_shared_prefix"
KEPT_BIAS = 1 << 16  # largest bias that is kept, in elements


@torch.compiler.disable  # or every micro-batch, with segments of its own, would have the blocks compiled again
def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    segments: SegmentIndex,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,  # transformers passes its own extras (dropout, position_ids, ...) to every implementation
) -> tuple[Tensor, None]:
    """Attend within groups as the packed layout says; returns [1, tokens, heads, head_dim].

    Raises:
        ValueError: the model built a mask of its own or has attention sinks, which this layout cannot honour.
    """
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, which packed groups do not honour yet")
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} passes an attention mask; packed groups cannot honour it")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):  # as the kernels want it
        if softcap is None:
            return varlen(query, key, value, segments, scaling, sliding_window), None
        return flex(query, key, value, segments, scaling, sliding_window, softcap), None
    # Cut once, in whole: the backward pass is then one concatenation. That of a slice fills a tensor as long as the row.
    lengths = [s.stop - s.start for s in segments.segments]
    cut = zip(segments.segments, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    parts, prompt_key, prompt_value = [], key[:, :, :0], value[:, :, :0]
    for s, q, k, v in cut:
        if s.prompt_stop > s.prompt_start:  # a completion; its prompt is the last segment that is none
            k, v = torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)
        else:
            prompt_key, prompt_value = k, v
        parts.append(_attend(q, k, v, scaling, sliding_window, softcap))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(
    q: Tensor,  # [1, heads, queries, head_dim]
    k: Tensor,  # [1, kv_heads, keys, head_dim]: a prompt's before a completion's own
    v: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    if softcap is not None:
        return _softcapped(q, k, v, scaling, window, softcap)
    window = None if window is None or window >= keys else window
    if window is None and queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    make = _bias if queries * keys <= KEPT_BIAS else _bias.__wrapped__
    bias = make(queries, keys, window, q.dtype, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling, enable_gqa=grouped)


@lru_cache(maxsize=512)  # every layer, and its recomputation, wants the same
def _bias(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make what is added to scores: 0 where a query sees a key, else -inf."""
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(
        ~_visible(queries, keys, window, device), float("-inf")
    )


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Say which keys a query sees: those up to its own, bottom-right aligned, at most `window` of them."""
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    seen = k <= q
    return seen if window is None else seen & (k > q - window)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float) -> Tensor:
    """Attend with scores squashed to +-softcap (Gemma 2), which the fused kernels of torch do not offer."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(q.shape[2], k.shape[2], window, q.device), float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentIndex, scaling: float | None, window: int | None
) -> Tensor:
    """Attend in one kernel call on CUDA; FlashAttention aligns causal masks to the bottom right when q is shorter than k.

    Source: https://docs.pytorch.org/docs/2.13/nn.attention.varlen.html
    """
    from torch.nn.attention.varlen import varlen_attn

    index = segments.varlen
    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [tokens, kv_heads, head_dim]
    if index.keys is not None:
        k, v = k.index_select(0, index.keys), v.index_select(0, index.keys)
    out = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        k,
        v,
        index.cu_queries,
        index.cu_keys,
        index.longest_queries,
        index.longest_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # noqa: S101 - no auxiliary outputs were asked for
    return out[None]


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentIndex,
    scaling: float | None,
    window: int | None,
    softcap: float,
) -> Tensor:
    """Attend with squashed scores in one kernel on CUDA; on the CPU it is slow, and has no gradient.

    Source: https://docs.pytorch.org/docs/2.13/nn.attention.flex_attention.html
    """
    out = _flex_attention(query.device.type)(
        query,
        key,
        value,
        score_mod=_squashed(softcap),
        block_mask=segments.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


@lru_cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Return the fused kernel, which only the compiler makes; the CPU's plain form is for comparison alone."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@lru_cache
def _squashed(softcap: float) -> Callable[..., Tensor]:
    """Make the change of scores; the same function each time, so that it is compiled once."""

    def squashed(score: Tensor, _batch: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return squashed


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)
