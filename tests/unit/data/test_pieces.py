"""Pieces of a shard: wherever it is cut, the rows of all pieces in order are the rows of the whole."""

from __future__ import annotations

import gzip
import io
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.data.admission import Rejected
from dpo_ray.data.readers import chunks, json_rows
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import Piece, Shard, pieces
from tests.unit.data.conftest import only_shard

LINES = st.one_of(
    st.just(b""),
    st.just(b" \t"),
    st.integers(0, 10**12).map(lambda number: b"%d" % number),
    st.text(max_size=9).map(lambda text: b'{"a": "' + text.encode("utf-8", "replace").hex().encode() + b'"}'),
    st.binary(max_size=9).map(lambda data: b'"' + data.replace(b"\n", b"") + b'"'),
    st.integers(30, 90).map(lambda length: b"9" * length),  # longer than the limit of 40
)


def shown(row: Any) -> Any:
    return (row.reason, row.detail) if isinstance(row, Rejected) else row


def rows_of(piece: Piece) -> list[Any]:
    rows = [row for batch in read_batches(piece, 3) for row in batch]
    assert [ordinal for ordinal, _ in rows] == list(range(len(rows)))
    return [shown(row) for _, row in rows]


def rows_in(shard: Shard, piece_bytes: int) -> list[Any]:
    return [row for piece in pieces(shard, piece_bytes) for row in rows_of(piece)]


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(LINES, max_size=12),
    end=st.sampled_from([b"\n", b"\r\n"]),
    has_end=st.booleans(),
    bom=st.booleans(),
    piece_bytes=st.integers(1, 150),
    chunk_bytes=st.integers(1, 60),
)
def test_json_lines_cut_anywhere(
    lines: list[bytes], end: bytes, has_end: bool, bom: bool, piece_bytes: int, chunk_bytes: int
):
    text = (b"\xef\xbb\xbf" if bom else b"") + end.join([*lines, b""] if has_end else lines)
    limit, chunk = json_rows.MAX_ROW_BYTES, chunks.PLAIN_CHUNK_BYTES
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "a.jsonl"
        path.write_bytes(text)
        try:
            json_rows.MAX_ROW_BYTES = 40
            shard = only_shard(str(path))
            whole = rows_of(Piece(shard))
            chunks.PLAIN_CHUNK_BYTES = chunk_bytes
            cut = pieces(shard, piece_bytes)
            assert len(cut) == max(1, -(-len(text) // piece_bytes))
            assert [kind(row) for row in rows_in(shard, piece_bytes)] == [kind(row) for row in whole]
        finally:
            json_rows.MAX_ROW_BYTES, chunks.PLAIN_CHUNK_BYTES = limit, chunk
    filled = [line for line in lines if line.strip()]
    assert len(whole) == len(filled)


def kind(row: Any) -> Any:
    """Of a line that is too long, the detail shows what was read of it by then."""
    return "TOO_LONG_BYTES" if isinstance(row, tuple) and row[0] == "TOO_LONG_BYTES" else row


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 40), group_rows=st.integers(1, 50), piece_bytes=st.integers(1, 3000))
def test_parquet_cut_at_row_groups(rows: int, group_rows: int, piece_bytes: int):
    sink = io.BytesIO()
    made = [{"prompt": f"p{i}", "chosen": "c" * i, "rejected": "r"} for i in range(rows)]
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
    pq.write_table(pa.Table.from_pylist(made, schema), sink, row_group_size=group_rows)
    fsspec.filesystem("memory").pipe_file("/pieces/a.parquet", sink.getvalue())
    shard = only_shard("memory://pieces/a.parquet")
    cut = pieces(shard, piece_bytes)
    assert [row for piece in cut for row in rows_of(piece)] == made
    assert all(rows_of(piece) for piece in cut) or not made


def test_what_cannot_be_cut_is_one_piece(tmp_path: Path):
    lines = [b'{"a": %d}' % i for i in range(100)]
    files = {
        "list.json": b" [" + b",".join(lines) + b"]",
        "a.csv": b"a\n" + b"1\n" * 100,
        "a.jsonl.gz": gzip.compress(b"\n".join(lines), 0),
        "damaged.parquet": b"PAR1" + bytes(100),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        shard = only_shard(f"{tmp_path}/{name}")
        assert pieces(shard, 10) == [Piece(shard)], name
        (tmp_path / name).unlink()
        assert pieces(shard, 10) == [Piece(shard)], name


def test_pieces_of_a_plain_file_have_about_the_size_that_is_asked_for(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' * 1000)
    cut = pieces(only_shard(f"{tmp_path}/a.jsonl"), 3000)
    assert [(p.index, p.start, p.stop) for p in cut] == [(0, 0, 3000), (1, 3000, 6000), (2, 6000, None)]
    assert [len(rows_of(p)) for p in cut] == [334, 333, 333]
