"""A micro-batch on the device: token ids, and the index tensors that attention, head and losses read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_ray.schedule.micro_batch import MicroBatch


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
    chosen: Tensor  # int64 [pairs]: index of the preferred completion
    rejected: Tensor  # int64 [pairs]
    pair_weight: Tensor  # float32 [pairs]
    preference_probability: Tensor  # float32 [pairs]
    reference_token_logps: Tensor  # float32 [rows]

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def packed_rows(batch: MicroBatch, device: torch.device | str = "cpu") -> PackedRows:
    """Work out the index tensors of a micro-batch and put them on `device`.

    The first token of every completion is predicted by the prompt's last token, every other by its predecessor.
    Pairs are all (i, j) of a group with score i > score j; each pair carries its group's weight.
    """
    segments = _segments(batch.group_index, batch.completion_index)
    completions = [s for s in segments if s.prompt_stop > s.prompt_start]
    predictor = np.concatenate([[s.prompt_stop - 1, *range(s.start, s.stop - 1)] for s in completions])
    rows = np.concatenate([np.arange(s.start, s.stop) for s in completions])
    lengths = np.array([s.stop - s.start for s in completions])
    owner = batch.group_index[[s.start for s in completions]]  # [completions]
    pairs = [
        (i, j, owner[i])
        for i in range(len(completions))
        for j in range(len(completions))
        if owner[i] == owner[j] and batch.scores[i] > batch.scores[j]
    ]
    chosen, rejected, pair_group = np.array(pairs, dtype=np.int64).reshape(-1, 3).T

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
        chosen=put(chosen),
        rejected=put(rejected),
        pair_weight=put(batch.weight[pair_group], torch.float32),
        preference_probability=put(batch.preference_probability[pair_group], torch.float32),
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
