"""Rows dealt to buckets: all of them and no others, in few pieces, with few files open."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.schedule import buckets
from dpo_ray.schedule.buckets import Bucket, deal_rows, read_rows

ROWS = 60


def loaders(bounds: Sequence[int]) -> list[Callable[[], pa.Table]]:
    """Make parts of rows 0 to `ROWS`, cut at `bounds`; a row's values tell its number, in lists of uneven lengths."""

    def part(start: int, stop: int) -> pa.Table:
        lists = [[f"{row}", *["x"] * (row % 3)] for row in range(start, stop)]
        return pa.table({"numbers": pa.array(lists, pa.list_(pa.string()))})

    return [lambda a=a, b=b: part(a, b) for a, b in pairwise([0, *sorted(bounds), ROWS])]


def expected(bucket: Bucket) -> list[dict]:
    rows = sorted({row for step in bucket.steps for row in step})
    return [{"numbers": [f"{row}", *["x"] * (row % 3)], "row": row} for row in rows]


rows_of_a_bucket = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, ROWS), max_size=7),
    st.lists(rows_of_a_bucket, max_size=14),
    st.sampled_from([2, 3, 256]),
    st.sampled_from([1, 300, 1 << 20]),
)
def test_every_bucket_has_its_rows_however_they_are_dealt(bounds, rows, open_files, dealt_bytes) -> None:
    """Parts without rows, rows in several buckets and in none, and buckets so many that they are dealt several times."""
    of_buckets = [Bucket("train", i, [held]) for i, held in enumerate(rows)]
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "MOST_OPEN_FILES", open_files)
        patch.setattr(buckets, "DEALT_BYTES", dealt_bytes)
        files = deal_rows(loaders(bounds), of_buckets, Path(root))
        assert [read_rows(file).to_pylist() for file in files] == [expected(bucket) for bucket in of_buckets]
        assert sorted(Path(root).iterdir()) == sorted(files)


@pytest.mark.parametrize("open_files", [3, 256])
def test_a_file_has_no_piece_without_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_files: int) -> None:
    monkeypatch.setattr(buckets, "MOST_OPEN_FILES", open_files)
    monkeypatch.setattr(buckets, "DEALT_BYTES", 1)  # each part by itself
    of_buckets = [Bucket("train", i, [[i, i + 1, 50 + i % 10]]) for i in range(10)]
    for file in deal_rows(loaders(range(0, ROWS, 5)), of_buckets, tmp_path):
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
            pieces = [batch["row"].to_pylist() for batch in reader]
        parts = [sorted({row // 5 for row in piece}) for piece in pieces]
        assert parts == [[part] for part in sorted({part for of_piece in parts for part in of_piece})]


def test_rows_of_several_parts_are_one_piece(tmp_path: Path) -> None:
    (file,) = deal_rows(loaders(range(0, ROWS, 5)), [Bucket("train", 0, [range(ROWS)])], tmp_path)
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
        assert [len(batch) for batch in reader] == [ROWS]


@contextmanager
def few_open_files(more: int) -> Iterator[None]:
    """Limit how many more files this process may open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/dev/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, before[1]))
    held = []
    try:
        while len(os.listdir("/dev/fd")) < used + 1:  # numbers below that are free would let more be opened
            held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_OPEN_FILES", 4)
    monkeypatch.setattr(buckets, "DEALT_BYTES", 1)
    of_buckets = [Bucket("train", i, [[i, 59 - i]]) for i in range(40)]
    with few_open_files(4 + 4):
        files = deal_rows(loaders(range(0, ROWS, 5)), of_buckets, tmp_path)
    assert [read_rows(file)["row"].to_pylist() for file in files] == [sorted({i, 59 - i}) for i in range(40)]


def test_many_small_buckets_take_little_more_than_their_rows(tmp_path: Path) -> None:
    """Wherever their rows lie: thousands of buckets, each with a row of every part."""
    parts, each = 8, 2000
    values = np.arange(parts * each * 100, dtype=np.int32)
    whole = pa.table({"ids": pa.FixedSizeListArray.from_arrays(pa.array(values), 100)})
    tables = [lambda i=i: whole.slice(i * each, each) for i in range(parts)]
    of_buckets = [Bucket("train", b, [[b + i * each for i in range(parts)]]) for b in range(each)]
    files = deal_rows(tables, of_buckets, tmp_path)
    assert sum(file.stat().st_size for file in files) < 1.5 * whole.nbytes
    assert read_rows(files[7])["ids"][2].as_py()[0] == (7 + 2 * each) * 100
