"""The index tensors of a micro-batch, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dpo_ray.models.packed_rows import Segment, packed_rows
from dpo_ray.schedule.micro_batch import Group, pack


def group(prompt: list[int], completions: list[list[int]], scores: list[float], **facts: float) -> Group:
    ids = tuple(np.array(c, np.int32) for c in completions)
    return Group(b"g" * 16, np.array(prompt, np.int32), ids, np.array(scores, np.float32), **facts)


def test_segments_predictors_and_targets() -> None:
    rows = packed_rows(pack([group([5, 6], [[7], [8, 9]], [1, 0]), group([3], [[4, 4, 4]], [1])]))
    # tokens:                0 1 | 2 | 3 4 || 5 | 6 7 8
    assert rows.segments == (
        Segment(0, 2, 0, 0),
        Segment(2, 3, 0, 2),
        Segment(3, 5, 0, 2),
        Segment(5, 6, 5, 5),
        Segment(6, 9, 5, 6),
    )
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 4, 4]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 3]]
    assert rows.predictor.tolist() == [1, 1, 3, 5, 6, 7]
    assert rows.target.tolist() == [7, 8, 9, 4, 4, 4]
    assert rows.completion_of_row.tolist() == [0, 1, 1, 2, 2, 2]
    assert rows.lengths.tolist() == [1, 2, 3]
    assert rows.tokens == 9


def test_pairs_are_all_orderings_within_a_group() -> None:
    first = group([1], [[2], [3], [4]], [0.5, 2.0, 0.5], weight=0.25, preference_probability=0.75)
    rows = packed_rows(pack([first, group([1], [[2]], [9.0]), group([1], [[2], [3]], [0.0, 1.0], weight=3.0)]))
    assert list(zip(rows.chosen.tolist(), rows.rejected.tolist(), strict=True)) == [(1, 0), (1, 2), (5, 4)]
    assert rows.pair_weight.tolist() == [0.25, 0.25, 3.0]
    assert rows.preference_probability.tolist() == [0.75, 0.75, 1.0]


def test_a_batch_without_pairs_has_empty_pairs() -> None:
    rows = packed_rows(pack([group([1, 2], [[3], [4]], [1, 1])]))
    assert rows.chosen.shape == rows.rejected.shape == rows.pair_weight.shape == (0,)


def test_one_token_prompts_side_by_side_stay_apart() -> None:
    rows = packed_rows(pack([group([1], [[2]], [1]), group([1], [[2]], [1])]))
    assert [s.prompt_start for s in rows.segments] == [0, 0, 2, 2]
    assert rows.predictor.tolist() == [0, 2]


def test_reference_log_probs_follow_the_rows() -> None:
    known = (np.array([-1.0], np.float32), np.array([-2.0, -3.0], np.float32))
    first = replace(group([5, 6], [[7], [8, 9]], [1, 0]), reference_token_logps=known)
    rows = packed_rows(pack([first, group([3], [[4]], [1])]))
    assert rows.reference_token_logps.tolist() == [-1.0, -2.0, -3.0, 0.0]
    assert rows.reference_token_logps.dtype == torch.float32
