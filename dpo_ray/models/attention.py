"""Computes attention in a packed row, where all completions of a prompt use the same keys and values of the prompt.

A packed row holds several groups, one after the other. It is divided into segments: each prompt is a segment, and each
completion is a segment. A completion attends to the keys of its prompt, followed by the keys of the completion, with a causal
mask that is aligned bottom-right. No mask is built for the complete row, and every linear layer computes a prompt only once.

`shared_prefix_attention` is registered through transformers' attention interface
(https://huggingface.co/docs/transformers/attention_interface), so the code of the models is unchanged. It is not
registered for masks, so transformers passes `attention_mask=None`. Otherwise transformers would build a mask in which each
restart of `position_ids` is the start of a new sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from .packed_rows import Segment

IMPLEMENTATION = "dpo_ray_shared_prefix"
KEPT_BIAS = 1 << 16  # size limit of a cached bias, in elements


@torch.compiler.disable  # otherwise the blocks would be recompiled for the segments of every micro-batch
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
    **_: object,  # transformers passes further arguments (dropout, position_ids, ...) to every implementation
) -> tuple[Tensor, None]:
    """Compute attention in a packed row, separately for each segment (a prompt or a completion).

    Return [1, tokens, heads, head_dim].

    Raises:
        ValueError: the model passes an attention mask, or has attention sinks. This function supports neither of the two.
    """
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, which packed groups do not support yet")
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} passes an attention mask, which packed groups do not support")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):  # the types that the kernels support
        if softcap is None:
            return varlen(query, key, value, segments, scaling, sliding_window), None
        return flex(query, key, value, segments, scaling, sliding_window, softcap), None
    # One split, because its backward pass is one concatenation. With slices, each one would fill a tensor as long as the row.
    lengths = [s.stop - s.start for s in segments.segments]
    cut = zip(segments.segments, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    parts, prompt_key, prompt_value = [], key[:, :, :0], value[:, :, :0]
    for s, q, k, v in cut:
        if s.prompt_stop > s.prompt_start:  # a completion; its prompt is the last prompt segment before it
            k, v = torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)
        else:
            prompt_key, prompt_value = k, v
        parts.append(_attend(q, k, v, scaling, sliding_window, softcap))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(
    q: Tensor,  # [1, heads, queries, head_dim]
    k: Tensor,  # [1, kv_heads, keys, head_dim]: the prompt's keys, then the completion's
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


@lru_cache(maxsize=512)  # every layer and its recomputation use the same bias
def _bias(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build the bias that is added to the attention scores: 0 where a query may see a key, and -inf elsewhere."""
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(
        ~_visible(queries, keys, window, device), float("-inf")
    )


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return bool [queries, keys], True where a query may see a key. The last query has the position of the last key.

    A query sees the keys up to the query's position. With a window, it sees only the last `window` of these keys.
    """
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    seen = k <= q
    return seen if window is None else seen & (k > q - window)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float) -> Tensor:
    """Compute attention with scores that are soft-capped to +-softcap (Gemma 2). torch's fused kernels cannot do this."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(q.shape[2], k.shape[2], window, q.device), float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentIndex, scaling: float | None, window: int | None
) -> Tensor:
    """Compute attention of all segments in one CUDA kernel, which aligns causal masks bottom-right as needed here.

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
    assert isinstance(out, Tensor)  # noqa: S101 - no auxiliary outputs are requested
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
    """Compute attention with soft-capped scores in one CUDA kernel. On the CPU it is slow and has no gradient.

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
    """Return FlexAttention for a type of device: compiled on CUDA, and not compiled (for tests only) on other devices."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@lru_cache
def _squashed(softcap: float) -> Callable[..., Tensor]:
    """Return the function that soft-caps a score, for FlexAttention. It is cached, so that it is compiled only once."""

    def squashed(score: Tensor, _batch: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return squashed


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)


@dataclass(frozen=True)
class Varlen:
    """Arguments of `varlen_attn` (torch.nn.attention.varlen): the range of queries and the range of keys of each segment."""

    keys: Tensor | None  # int64 [keys]: the tokens whose keys are concatenated; None: all tokens in order
    cu_queries: Tensor  # int32 [segments + 1]: start of each sequence, and the end
    cu_keys: Tensor  # int32 [segments + 1]
    longest_queries: int
    longest_keys: int


class SegmentIndex:
    """The segments (prompts and completions) of one packed row. The segments fill the row without gaps.

    Index tensors are created on `device` when they are first used.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device | str) -> None:
        self.segments = tuple(segments)
        self._device = device
        self._block_masks: dict[int | None, BlockMask] = {}

    @cached_property
    def varlen(self) -> Varlen:
        """Compute the arguments of varlen attention. A completion has the keys of its prompt, followed by its own keys."""
        queries = np.array([s.stop - s.start for s in self.segments])
        keys = queries + np.array([s.prompt_stop - s.prompt_start for s in self.segments])
        gather = [np.r_[s.prompt_start : s.prompt_stop, s.start : s.stop] for s in self.segments]
        return Varlen(
            keys=None if np.array_equal(keys, queries) else self._put(np.concatenate(gather)),
            cu_queries=self._put(np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)),
            cu_keys=self._put(np.concatenate([[0], np.cumsum(keys)]).astype(np.int32)),
            longest_queries=int(queries.max()),
            longest_keys=int(keys.max()),
        )

    def block_mask(self, window: int | None) -> BlockMask:
        """Build FlexAttention's mask. A token sees the tokens of its prompt and its segment up to itself.

        Args:
            window: a token sees only the last `window` of these tokens; None: it sees all of them.
        """
        if window not in self._block_masks:
            tokens = self.segments[-1].stop
            own, prompt, position = self._of_tokens

            def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                seen = ((own[k] == own[q]) | (own[k] == prompt[q])) & (position[k] <= position[q])
                return seen if window is None else seen & (position[k] > position[q] - window)

            self._block_masks[window] = create_block_mask(visible, None, None, tokens, tokens, device=self._device)
        return self._block_masks[window]

    @cached_property
    def _of_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return three tensors int32 [tokens]: the segment of each token, the segment of the token's prompt, and its position.

        The position counts from the first token of the prompt.
        """
        number = {s.start: i for i, s in enumerate(self.segments)}
        lengths = [s.stop - s.start for s in self.segments]
        prompts = [
            i if s.prompt_stop == s.prompt_start else number[s.prompt_start] for i, s in enumerate(self.segments)
        ]
        positions = [np.arange(n) + s.prompt_stop - s.prompt_start for s, n in zip(self.segments, lengths, strict=True)]
        own, prompt = np.repeat(np.arange(len(lengths)), lengths), np.repeat(prompts, lengths)
        return tuple(self._put(a.astype(np.int32)) for a in (own, prompt, np.concatenate(positions)))  # pyright: ignore[reportReturnType]

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
