"""The index tensors of a micro-batch, against values worked out by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from dpo_ray.data.groups import Group
from dpo_ray.models.packed_rows import Segment, packed_rows
from dpo_ray.schedule.micro_batch import pack


def group(prompt: list[int], completions: list[list[int]], pairs: list[tuple[int, int]], **facts: float) -> Group:
    ids = tuple(np.array(c, np.int32) for c in completions)
    chosen, rejected = np.array(pairs, np.int32).reshape(-1, 2).T
    return Group(b"g" * 16, np.array(prompt, np.int32), ids, np.zeros(len(ids), np.float32), chosen, rejected, **facts)


def test_segments_predictors_and_targets() -> None:
    rows = packed_rows(pack([group([5, 6], [[7], [8, 9]], [(0, 1)]), group([3], [[4, 4, 4]], [])]))
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


def test_pairs_are_the_groups_own_in_their_order() -> None:
    first = group([1], [[2], [3], [4]], [(1, 0), (1, 2)], weight=0.25, preference_probability=0.75)
    rows = packed_rows(pack([first, group([1], [[2]], []), group([1], [[2], [3]], [(1, 0)], weight=3.0)]))
    assert list(zip(rows.chosen.tolist(), rows.rejected.tolist(), strict=True)) == [(1, 0), (1, 2), (5, 4)]
    assert rows.pair_weight.tolist() == [0.25, 0.25, 3.0]
    assert rows.preference_probability.tolist() == [0.75, 0.75, 1.0]


def test_a_batch_without_pairs_has_empty_pairs() -> None:
    rows = packed_rows(pack([group([1, 2], [[3], [4]], [])]))
    assert rows.chosen.shape == rows.rejected.shape == rows.pair_weight.shape == (0,)


def test_one_token_prompts_side_by_side_stay_apart() -> None:
    rows = packed_rows(pack([group([1], [[2]], []), group([1], [[2]], [])]))
    assert [s.prompt_start for s in rows.segments] == [0, 0, 2, 2]
    assert rows.predictor.tolist() == [0, 2]


def test_reference_log_probs_follow_the_rows() -> None:
    known = (np.array([-1.0], np.float32), np.array([-2.0, -3.0], np.float32))
    first = replace(group([5, 6], [[7], [8, 9]], [(0, 1)]), reference_token_logps=known)
    rows = packed_rows(pack([first, group([3], [[4]], [])]))
    assert rows.reference_token_logps.tolist() == [-1.0, -2.0, -3.0, 0.0]
    assert rows.reference_token_logps.dtype == torch.float32


def numbered_pair(number: int) -> Group:
    """Make a pair without chance; the better completion stands first or last."""
    lengths = [1 + (number * 5 + k * 3) % 7 for k in range(2)]
    scores = [[1.0, 0.0], [0.0, 1.0], [3.5, -2.0]][number % 3]
    best = int(np.argmax(scores))
    return Group(
        group_id=number.to_bytes(16, "little"),
        prompt_ids=np.arange(number % 6 + 1, dtype=np.int32) * 11 + number,
        completion_ids=tuple(np.arange(n, dtype=np.int32) * 7 + 100 * k + number for k, n in enumerate(lengths)),
        scores=np.array(scores, np.float32),
        chosen=np.array([best]),
        rejected=np.array([1 - best]),
        preference_probability=[1.0, 0.75][number % 2],
        weight=[1.0, 0.25, 2.0][number % 3],
        reference_token_logps=tuple(-np.arange(n, dtype=np.float32) / 8 - number for n in lengths),
    )


def digest(arrays: Iterable[np.ndarray]) -> str:
    h = hashlib.sha256()
    for a in arrays:
        h.update(f"{a.dtype}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


def test_two_completions_with_scores_are_what_they_were_when_scores_made_the_pairs() -> None:
    """The digests come from the code before groups named their pairs, which took every (i, j) with score i > score j."""
    batch = pack([numbered_pair(n) for n in range(24)])
    shared = ("input_ids", "position_ids", "group_index", "completion_index", "scores", "reference_token_logps")
    assert (
        digest(getattr(batch, n) for n in (*shared, "preference_probability", "weight"))
        == "5e9fdf8f34d891bcc7d891ae1a9668ac2d843471f4deaaf481133f12718831b1"
    )
    rows = packed_rows(batch)
    of_rows = ("input_ids", "position_ids", "predictor", "target", "completion_of_row", "lengths")
    of_pairs = ("chosen", "rejected", "pair_weight", "preference_probability", "reference_token_logps")
    assert (
        digest(getattr(rows, n).numpy() for n in (*of_rows, *of_pairs))
        == "6693b60c6a4fe094bf20962f8f4587968dffc649ac17ef55111e1cd942c96808"
    )
