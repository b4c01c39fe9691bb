"""A micro-batch on the device: token ids, and the index tensors that attention, head and losses read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dpo_ray.schedule.micro_batch import MicroBatch


Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one prompt, or of one completion together with the prompt it continues."""

    start: int
    stop: int
    prompt_start: int  # == prompt_stop for the prompt itself
    prompt_stop: int


@dataclass(frozen=True)
class PackedRows:
    """The tensors of one forward pass; `rows` are completion tokens in the order of the packed row."""

    input_ids: Tensor  # int64 [1, tokens]
    position_ids: Tensor  # int64 [1, tokens]
    segments: tuple[Segment, ...]
    predictor: Tensor  # int64 [rows]: the token whose hidden state predicts this row
    target: Tensor  # int64 [rows]
    completion_of_row: Tensor  # int64 [rows]
    lengths: Tensor  # int64 [completions]
    scores: Tensor  # float32 [completions]; NaN = a completion of another prompt
    completion_weight: Tensor  # float32 [completions]: the group's; 0 = filler
    group_of_completion: Tensor  # int64 [completions]
    chosen: Tensor  # int64 [pairs]: index of the preferred completion
    rejected: Tensor  # int64 [pairs]
    pair_weight: Tensor  # float32 [pairs]
    preference_probability: Tensor  # float32 [pairs]
    pair_source: Tensor  # int64 [pairs]: number of the data's source
    reference_token_logps: Tensor  # float32 [rows]

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def packed_rows(batch: MicroBatch, device: torch.device | str = "cpu", layout: Layout = "shared") -> PackedRows:
    """Work out the index tensors of a micro-batch and put them on `device`.

    The first token of every completion is predicted by the prompt's last token, every other by its predecessor.
    Each pair carries the weight and the preference probability of its group.
    """
    segments = _segments(batch.group_index, batch.completion_index)
    completions = [s for s in segments if s.prompt_stop > s.prompt_start]
    rows = np.flatnonzero(batch.completion_index)
    lengths = np.array([s.stop - s.start for s in completions])
    predictor = rows - 1
    predictor[np.cumsum(lengths) - lengths] = [s.prompt_stop - 1 for s in completions]
    group = batch.group_index[[s.start for s in completions]]  # [completions]
    pair_group = group[batch.chosen]

    def put(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(device=device, dtype=dtype, non_blocking=True)

    return PackedRows(
        input_ids=put(batch.input_ids)[None],
        position_ids=put(batch.position_ids)[None],
        segments=segments,
        predictor=put(predictor),
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
        pair_source=put(np.zeros(len(pair_group))),
        reference_token_logps=put(batch.reference_token_logps, torch.float32),
    )


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
