"""What the store lacks, and how it is cut: against plain loops over Python lists."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.storage import Storage
from dpo_ray.reference.granule import GRANULE
from dpo_ray.reference.lookup import LookupProgress, cut, find_missing, look_up
from dpo_ray.reference.store.store import Numerics, ReferenceStore

Rows = list[tuple[list[int], list[list[int]]]]

TOKEN = st.integers(0, 3)  # few, so that sequences meet
GROUP = st.tuples(
    st.lists(TOKEN, min_size=1, max_size=3),
    st.lists(st.lists(TOKEN, min_size=1, max_size=3), min_size=1, max_size=4),
)
ROWS = st.lists(GROUP, max_size=12)


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return store_in(tmp_path)


def store_in(root: Path) -> ReferenceStore:
    return ReferenceStore(Storage(root), "a" * 64, Numerics("vllm", "0.32.0", "cpu", "float32", "float32"))


def table_of(rows: Rows, first: int = 0) -> pa.Table:
    ids = [hashlib.blake2b(str(first + i).encode(), digest_size=16).digest() for i in range(len(rows))]
    columns = {"group_id": ids, "prompt_ids": [p for p, _ in rows], "completion_ids": [c for _, c in rows]}
    return pa.table(columns, schema=GRANULE)


def put(store: ReferenceStore, sequences: set[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    keys = [store.key(p, c) for p, c in sequences]
    store.append(keys, [np.full(len(c), -1.0, np.float32) for _, c in sequences])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, ROWS, st.integers(0, 5), st.booleans())
def test_it_is_what_a_plain_loop_finds(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, known: Rows, skipped: int, in_chunks: bool
) -> None:
    store = store_in(tmp_path_factory.mktemp("store"))
    there = {(tuple(p), tuple(c)) for p, cs in known for c in cs}
    if there:
        put(store, there)
    table = table_of(rows).append_column("other", pa.array(range(len(rows)), pa.int64())).slice(skipped)
    if in_chunks and len(table):
        table = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    missing, found = find_missing(table, store, store.index())
    expected = [
        {**row, "completion_ids": lacking}
        for row in table.select(GRANULE.names).to_pylist()
        if (lacking := [c for c in row["completion_ids"] if (tuple(row["prompt_ids"]), tuple(c)) not in there])
    ]
    assert missing.schema == GRANULE
    assert missing.to_pylist() == expected
    asked = sum(len(row["completion_ids"]) for row in table.to_pylist())
    assert found == asked - sum(len(row["completion_ids"]) for row in expected)


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(1, 6))
def test_a_cut_keeps_all_rows_in_order(lengths: list[int], groups: int) -> None:
    rows: Rows = [([i], [[i]]) for i in range(sum(lengths))]
    whole = table_of(rows)
    starts = np.cumsum([0, *lengths])
    pieces = list(cut((whole.slice(s, n) for s, n in zip(starts, lengths, strict=False)), groups))
    assert [len(p) for p in pieces[:-1]] == [groups] * (len(pieces) - 1)
    assert all(0 < len(p) <= groups for p in pieces)
    assert [row for p in pieces for row in p.to_pylist()] == whole.to_pylist()


def test_a_look_up_tells_counts_and_granules_in_turns(store: ReferenceStore) -> None:
    put(store, {((1,), (5,)), ((2,), (5,)), ((3,), (5,))})
    parts = [
        table_of([([1], [[5]]), ([2], [[5], [6]]), ([4], [[5], [6]])]),
        table_of([([3], [[5]]), ([7], [[5]]), ([1], [[5]])], first=3),
    ]
    said = list(look_up(parts, store, store.index(), groups_per_granule=2))
    assert [type(item) for item in said] == [LookupProgress, pa.Table, LookupProgress, pa.Table, LookupProgress]
    assert said[0] == LookupProgress(known_groups=1, found=2, granule=True)
    assert [g["completion_ids"] for g in said[1].to_pylist()] == [[[6]], [[5], [6]]]
    assert said[2] == LookupProgress(known_groups=2, found=2, granule=True)
    assert [g["prompt_ids"] for g in said[3].to_pylist()] == [[7]]
    assert said[4] == LookupProgress(known_groups=0, found=0, granule=False)


def test_where_all_is_known_there_is_no_granule(store: ReferenceStore) -> None:
    put(store, {((1,), (5,))})
    said = list(look_up([table_of([([1], [[5], [5]])])], store, store.index(), 10))
    assert said == [LookupProgress(known_groups=1, found=2, granule=False)]
    assert list(look_up([], store, store.index(), 10)) == [LookupProgress(0, 0, granule=False)]
