"""The segments of a forward pass as attention kernels read them; one object for all layers, so that nothing is made twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .packed_rows import Segment


@dataclass(frozen=True)
class Varlen:
    """Arguments of `torch.nn.attention.varlen.varlen_attn`: a sequence of queries and one of keys for each segment."""

    keys: Tensor | None  # int64 [keys]: tokens whose keys are laid end to end; None: all tokens as they stand
    cu_queries: Tensor  # int32 [segments + 1]: where each sequence begins, and the end
    cu_keys: Tensor  # int32 [segments + 1]
    longest_queries: int
    longest_keys: int


class SegmentIndex:
    """Segments of one row, which they fill without gaps; index tensors on `device` are made at their first use."""

    def __init__(self, segments: Sequence[Segment], device: torch.device | str) -> None:
        self.segments = tuple(segments)
        self._device = device
        self._block_masks: dict[int | None, BlockMask] = {}

    @cached_property
    def varlen(self) -> Varlen:
        """Work out what varlen attention reads: a completion's keys are its prompt's, then its own."""
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
        """Make FlexAttention's mask: a token sees its segment and its prompt up to itself, at most `window` tokens back."""
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
        """Of each token, int32 [tokens]: its segment, its prompt's (of a prompt: itself), its position in both together."""
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
