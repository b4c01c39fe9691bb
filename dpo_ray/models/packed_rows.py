"""Copies a micro-batch to the device, with the index tensors that attention, head and losses need.

Layouts: `shared` is one row with each prompt once, followed by all completions of the prompt. `packed` is one row in which the
prompt is repeated before each completion. `padded` has a row for each completion with its prompt, padded to equal length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dpo_ray.schedule.micro_batch import MicroBatch

Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True)
class Segment:
    """The range of tokens of one prompt, or of one completion. For a completion, also the range of its prompt."""

    start: int
    stop: int
    prompt_start: int  # equals prompt_stop if the segment is a prompt
    prompt_stop: int


@dataclass(frozen=True)
class PackedRows:
    """The tensors of one forward pass, in the order of the micro-batch. `rows` is the number of completion tokens."""

    input_ids: Tensor  # int64 [1, tokens]; padded: [completions, longest]
    position_ids: Tensor  # the same shape
    segments: tuple[Segment, ...] | None  # padded: None
    mask: Tensor | None  # only padded: int64, 1 for tokens and 0 for padding
    predictor: Tensor  # int64 [rows]: index of the token whose hidden state predicts this row
    target: Tensor  # int64 [rows]
    completion_of_row: Tensor  # int64 [rows]
    lengths: Tensor  # int64 [completions]
    scores: Tensor  # float32 [completions]; NaN = a completion of another prompt
    completion_weight: Tensor  # float32 [completions]: weight of the group; 0 = filler
    group_of_completion: Tensor  # int64 [completions]
    chosen: Tensor  # int64 [pairs]: index of the preferred completion
    rejected: Tensor  # int64 [pairs]
    pair_weight: Tensor  # float32 [pairs]
    preference_probability: Tensor  # float32 [pairs]
    pair_source: Tensor  # int64 [pairs]: index of the data source, -1 if it is not measured
    reference_token_logps: Tensor  # float32 [rows]

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the forward pass computes, including padding."""
        return self.input_ids.numel()


def packed_rows(
    batch: MicroBatch, device: torch.device | str = "cpu", layout: Layout = "shared", sources: Sequence[str] = ()
) -> PackedRows:
    """Compute the index tensors of a micro-batch and copy them to `device`.

    The first token of a completion is predicted by the last token of its prompt, and any other token by the token before
    it. The order of the rows (completion tokens), and the tensors over completions and pairs, are the same in every layout.
    Each pair has the weight and the preference probability of its group, and the index of its data source in `sources`.
    """
    segments = _segments(batch.group_index, batch.completion_index)
    completions = [s for s in segments if s.prompt_stop > s.prompt_start]
    rows = np.flatnonzero(batch.completion_index)
    lengths = np.array([s.stop - s.start for s in completions])
    group = batch.group_index[[s.start for s in completions]]  # [completions]
    pair_group = group[batch.chosen]
    source = np.array([sources.index(s) if s in sources else -1 for s in batch.sources])  # [groups]
    tokens = _laid_out(batch, segments, completions, rows, lengths, layout)

    def put(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(device=device, dtype=dtype, non_blocking=True)

    return PackedRows(
        input_ids=put(tokens.input_ids),
        position_ids=put(tokens.position_ids),
        segments=tokens.segments,
        mask=None if tokens.mask is None else put(tokens.mask),
        predictor=put(tokens.predictor),
        target=put(batch.input_ids[rows]),
        completion_of_row=put(np.repeat(np.arange(len(completions)), lengths)),
        lengths=put(lengths),
        scores=put(batch.scores, torch.float32),
        completion_weight=put(batch.weight[group], torch.float32),
        group_of_completion=put(group),
        chosen=put(batch.chosen),
        rejected=put(batch.rejected),
        pair_weight=put(batch.weight[pair_group], torch.float32),
        preference_probability=put(batch.preference_probability[pair_group], torch.float32),
        pair_source=put(source[pair_group]),
        reference_token_logps=put(batch.reference_token_logps, torch.float32),
    )


@dataclass(frozen=True)
class _Tokens:
    """The fields of PackedRows that depend on the layout, as numpy arrays."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    predictor: np.ndarray
    segments: tuple[Segment, ...] | None = None
    mask: np.ndarray | None = None


def _laid_out(
    batch: MicroBatch,
    segments: tuple[Segment, ...],
    completions: list[Segment],
    rows: np.ndarray,
    lengths: np.ndarray,
    layout: Layout,
) -> _Tokens:
    firsts = np.cumsum(lengths) - lengths  # [completions]: first row of each completion
    if layout == "shared":
        predictor = rows - 1
        predictor[firsts] = [s.prompt_stop - 1 for s in completions]
        return _Tokens(batch.input_ids[None], batch.position_ids[None], predictor, segments)
    sequences = [np.r_[s.prompt_start : s.prompt_stop, s.start : s.stop] for s in completions]
    width = max(map(len, sequences)) if layout == "padded" else 0
    starts = np.cumsum([0, *(width or len(s) for s in sequences[:-1])])  # start of each sequence among the tokens
    before = [start + len(s) - n - 1 for start, s, n in zip(starts, sequences, lengths, strict=True)]
    predictor = np.repeat(np.array(before) - firsts, lengths) + np.arange(len(rows))
    if layout == "packed":
        tokens = np.concatenate(sequences)
        bounds = [*starts.tolist(), len(tokens)]
        whole = tuple(Segment(a, b, a, a) for a, b in itertools.pairwise(bounds))
        return _Tokens(batch.input_ids[tokens][None], batch.position_ids[tokens][None], predictor, whole)
    at = np.arange(width)[None, :]
    mask = at < np.array([len(s) for s in sequences])[:, None]  # [completions, width]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = batch.input_ids[np.concatenate(sequences)]
    return _Tokens(ids, np.repeat(at, len(mask), axis=0), predictor, mask=mask)


def _segments(group_index: np.ndarray, completion_index: np.ndarray) -> tuple[Segment, ...]:
    changes = np.flatnonzero(np.diff(group_index) | np.diff(completion_index)) + 1
    bounds = [0, *changes.tolist(), len(group_index)]
    segments, prompt = [], (0, 0)
    for start, stop in itertools.pairwise(bounds):
        if completion_index[start] == 0:
            prompt = (start, stop)
            segments.append(Segment(start, stop, start, start))
        else:
            segments.append(Segment(start, stop, *prompt))
    return tuple(segments)
