"""The order in which buckets are scored: what training reads next, first; and every group, whether a step holds it or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.schedule.buckets import Bucket, buckets_of, read_rows
from dpo_ray.schedule.streaming_order import SPARE_ROWS, deal_turns, in_turn, spare_rows


def buckets(split: str, steps: int) -> list[Bucket]:
    return buckets_of(split, [[step] for step in range(steps)])


def places(turns: list[Bucket]) -> list[tuple[str, int]]:
    return [(b.split, b.first_step) for b in turns]


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [
        # Buckets of training begin at the steps 0, 4, 12, 28; the evaluation after step 12 comes before step 13, index 12.
        (0, 12, ["t0", "t4", "a0", "b0", "t12", "t28"]),
        (0, 13, ["t0", "t4", "t12", "a0", "b0", "t28"]),
        (0, 1, ["t0", "a0", "b0", "t4", "t12", "t28"]),
        (0, None, ["t0", "t4", "t12", "t28", "a0", "b0"]),
        (12, 12, ["t12", "a0", "b0", "t28", "t0", "t4"]),
        (5, None, ["t4", "t12", "t28", "a0", "b0", "t0"]),
        (30, None, ["a0", "b0", "t0", "t4", "t12", "t28"]),
    ],
)
def test_order_of_turns(start: int, every: int | None, expected: list[str]) -> None:
    of_splits = {"train": buckets("train", 30), "eval_a": buckets("eval_a", 2), "eval_b": buckets("eval_b", 3)}
    short = {"train": "t", "eval_a": "a", "eval_b": "b"}
    assert [f"{short[s]}{first}" for s, first in places(in_turn(of_splits, start, every))] == expected


@given(st.integers(1, 700), st.integers(0, 60), st.integers(0, 800), st.none() | st.integers(1, 300))
def test_nothing_is_needed_before_its_turn(steps: int, heldout_steps: int, start: int, every: int | None) -> None:
    """Follow the reading of a training from `start` on: each file that it opens comes no earlier than those before it."""
    of_splits = {"train": buckets("train", steps), "eval": buckets("eval", heldout_steps)}
    turns = places(in_turn(of_splits, start, every))
    assert sorted(turns) == sorted(places([b for split in of_splits.values() for b in split]))
    place = {what: i for i, what in enumerate(turns)}
    of_step = {i: place["train", b.first_step] for b in of_splits["train"] for i in range(b.first_step, b.stop_step)}
    heldout = max((place["eval", b.first_step] for b in of_splits["eval"]), default=-1)
    evaluations = [] if every is None else [step for step in range(start + 1, steps + 1) if step % every == 0]
    for step in range(start, steps):
        assert step == start or of_step[step] >= of_step[step - 1]
    for step in evaluations[:1]:
        later = [of_step[i] for i in range(step, steps) if of_step[i] != of_step[step - 1]]
        assert all(heldout < place_of_later for place_of_later in later)


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), max_size=10))
def test_spare_rows_are_those_that_no_step_holds(steps: list[list[int]]) -> None:
    spare = [row for bucket in spare_rows("train", steps, 41) for row in bucket.rows]
    assert sorted(spare) == sorted(set(range(41)) - {row for step in steps for row in step})


def test_many_spare_rows_make_several_turns() -> None:
    spare = spare_rows("train", [[0]], 2 * SPARE_ROWS + 2)
    assert [len(b.rows) for b in spare] == [SPARE_ROWS, SPARE_ROWS, 1]


def test_every_row_is_dealt_to_the_turns_that_hold_it(tmp_path: Path) -> None:
    def loaders(base: int, *sizes: int) -> list[Callable[[], pa.Table]]:
        starts = [base + sum(sizes[:i]) for i in range(len(sizes))]
        return [
            lambda a=a, n=n: pa.table({"number": pa.array(range(a, a + n), pa.int64())})
            for a, n in zip(starts, sizes, strict=True)
        ]

    train = [[i, (i + 3) % 9] for i in range(6)]  # buckets of 4 and 2 steps; row 9 is in no step
    sources = [("train", loaders(0, 4, 0, 6), train, 10), ("eval", loaders(100, 3), [[2, 0], [1]], 3)]
    turns = deal_turns(sources, 0, None, tmp_path)
    assert [(t.bucket.split, t.bucket.first_step, t.is_scheduled) for t in turns] == [
        ("train", 0, True),
        ("train", 4, True),
        ("eval", 0, True),
        ("train", 6, False),
    ]
    rows = [dict(zip(*(read_rows(t.file)[c].to_pylist() for c in ("row", "number")), strict=True)) for t in turns]
    assert rows[0] == {i: i for i in range(7)}
    assert rows[1] == {4: 4, 5: 5, 7: 7, 8: 8}
    assert rows[2] == {0: 100, 1: 101, 2: 102}
    assert rows[3] == {9: 9}
