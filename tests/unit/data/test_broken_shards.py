"""A broken shard becomes one SHARD_UNREADABLE row after the rows before the break; the other shards go on."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpo_ray.data import rows as rows_module
from dpo_ray.data.admission import Rejected
from dpo_ray.data.rows import read_rows
from dpo_ray.errors import InfrastructureError

from .conftest import only_shard

ROWS = [{"prompt": f"Say {i}.", "chosen": f" good {random.Random(i).random()}", "rejected": " bad"} for i in range(400)]
LINES = [json.dumps(r).encode() for r in ROWS]
TEXT = b"\n".join(LINES) + b"\n"
GZIP, ZSTD = gzip.compress(TEXT), pa.compress(TEXT, "zstd", asbytes=True)


def parquet(rows: list = ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


def arrow(rows: list = ROWS) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return sink.getvalue().to_pybytes()


def parquet_with_two_columns_of_one_name() -> bytes:
    sink, a = pa.BufferOutputStream(), pa.array(["x"])
    pq.write_table(pa.table([a, a, a, a], names=["prompt", "chosen", "rejected", "chosen"]), sink)
    return sink.getvalue().to_pybytes()


BROKEN: dict[str, Callable[[], bytes]] = {
    "truncated.jsonl.gz": lambda: GZIP[: len(GZIP) // 2],
    "header-only.jsonl.gz": lambda: GZIP[:4],
    "zero.jsonl.gz": lambda: b"",
    "no-gzip.jsonl.gz": lambda: TEXT,
    "checksum.jsonl.gz": lambda: GZIP[:-8] + bytes(8),
    "bits.jsonl.gz": lambda: GZIP[:2000] + b"\xff" * 50 + GZIP[2050:],
    "garbage-after.jsonl.gz": lambda: GZIP + b"garbage",
    "truncated.jsonl.zst": lambda: ZSTD[: len(ZSTD) // 2],
    "zero.jsonl.zst": lambda: b"",
    "no-zstd.jsonl.zst": lambda: TEXT,
    "zero.parquet": lambda: b"",
    "magic.parquet": lambda: parquet()[:-4] + b"XXXX",
    "truncated.parquet": lambda: parquet()[:-500],
    "page.parquet": lambda: parquet()[:300] + bytes(200) + parquet()[500:],
    "two-columns.parquet": parquet_with_two_columns_of_one_name,
    "zero.arrow": lambda: b"",
    "text.arrow": lambda: TEXT,
    "truncated.arrow": lambda: arrow()[: len(arrow()) // 2],
    "half.arrow": lambda: b"ARROW1\0\0" + b"x" * 50,
}
ALL_BEFORE_THE_BREAK = {"checksum.jsonl.gz", "garbage-after.jsonl.gz"}
SOME_BEFORE_THE_BREAK = {"truncated.jsonl.gz", "truncated.arrow"}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_ends_with_one_unreadable_row(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(BROKEN[name]())
    rows = list(read_rows(only_shard(f"{tmp_path}/{name}")))
    assert [ordinal for ordinal, _ in rows] == list(range(len(rows)))
    last = rows[-1][1]
    assert isinstance(last, Rejected)
    assert last.reason == "SHARD_UNREADABLE"
    assert last.detail
    before = [row for _, row in rows[:-1] if not (isinstance(row, Rejected) and row.reason == "JSON_SYNTAX")]
    assert all(row in ROWS for row in before if isinstance(row, dict))
    if name in ALL_BEFORE_THE_BREAK:
        assert before == ROWS
    if name in SOME_BEFORE_THE_BREAK:
        assert before == ROWS[: len(before)]
        assert before


def test_sound_shards_beside_broken_ones_are_whole(tmp_path: Path, prepare):
    for name, data in BROKEN.items():
        (tmp_path / f"0-{name}").write_bytes(data())
    (tmp_path / "1-sound.jsonl").write_bytes(TEXT)
    prepared = prepare(f"{tmp_path}/[01]-*")
    assert prepared.rows["train/admitted"] == len(ROWS)
    assert prepared.reasons().count("SHARD_UNREADABLE") == len(BROKEN)
    account = next(a for a in prepared.artifact.manifest.figures["accounts"] if a["source"] == "1-sound.jsonl")
    assert account["rows_in"] == len(ROWS)
    assert not account["reasons"]


def test_file_that_vanished(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(TEXT)
    shard = only_shard(f"{tmp_path}/a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    ((_, row),) = read_rows(shard)
    assert (row.reason, "FileNotFoundError" in row.detail) == ("SHARD_UNREADABLE", True)


def test_file_without_permission(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(TEXT)
    shard = only_shard(str(path))
    path.chmod(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)  # root may read everything
    try:
        ((_, row),) = read_rows(shard)
    finally:
        os.seteuid(before)
    assert (row.reason, "PermissionError" in row.detail) == ("SHARD_UNREADABLE", True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_device_that_fails_while_reading(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    shard = only_shard(f"{tmp_path}/{name}")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/proc/self/mem")
    ((_, row),) = read_rows(shard)
    assert row.reason == "SHARD_UNREADABLE"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl"])
def test_no_damage_crashes_the_reader(tmp_path: Path, name: str):
    whole = {"a.parquet": parquet, "a.arrow": arrow, "a.jsonl.gz": lambda: GZIP, "a.jsonl.zst": lambda: ZSTD}
    data, path, rng = whole.get(name, lambda: TEXT)(), tmp_path / name, random.Random(name)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 10)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        ordinals = [ordinal for ordinal, _ in read_rows(only_shard(str(path)))]
        assert ordinals == list(range(len(ordinals)))


def test_parquet_cell_that_is_not_utf8_costs_its_row_alone(tmp_path: Path):
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")
    prompts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    pq.write_table(pa.table({"prompt": prompts, "chosen": ["x"] * 3, "rejected": ["y"] * 3}), tmp_path / "a.parquet")
    rows = [row for _, row in read_rows(only_shard(f"{tmp_path}/a.parquet"))]
    assert [r["prompt"] if isinstance(r, dict) else r.reason for r in rows] == ["a", "INVALID_UTF8", "c"]


def test_line_longer_than_the_limit_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 500)
    for chunk in (7, 100, 499, 501, 1 << 20):  # the line ends within, at and beyond a chunk
        monkeypatch.setattr(rows_module, "PLAIN_CHUNK_BYTES", chunk)
        for length in (501, 1500, 5000):
            lines = [LINES[0], b"x" * length, LINES[1], b"y" * length]
            (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
            rows = [row for _, row in read_rows(only_shard(f"{tmp_path}/a.jsonl"))]
            got = [r if isinstance(r, dict) else r.reason for r in rows]
            expected = [ROWS[0], "TOO_LONG_BYTES", ROWS[1], "TOO_LONG_BYTES"]
            assert got == expected, (chunk, length)


class FlakyFileSystem(MemoryFileSystem):
    """A remote storage that breaks off after the first read of a file."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012 - as MemoryFileSystem has it
    reads = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: object):
        file = super()._open(path, mode, **options)
        if "r" in mode:
            inner = file.read

            def read(size: int = -1) -> bytes:
                FlakyFileSystem.reads += 1
                if FlakyFileSystem.reads > 1:
                    raise ConnectionResetError("by peer")
                return inner(size)

            file.read = read
        return file


def test_failing_remote_storage_stops_instead_of_giving_up_rows(monkeypatch: pytest.MonkeyPatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    fsspec.filesystem("flaky").pipe_file("/a.jsonl", TEXT)
    monkeypatch.setattr(rows_module, "PLAIN_CHUNK_BYTES", 1000)
    with pytest.raises(InfrastructureError, match="ConnectionResetError") as caught:
        list(read_rows(only_shard("flaky:///a.jsonl")))
    assert "flaky://" in caught.value.where


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_remote_files_are_read_like_local_ones(name: str):
    data = {"a.parquet": parquet(), "a.arrow": arrow(), "a.jsonl.gz": GZIP, "a.jsonl.zst": ZSTD}.get(name, TEXT)
    fsspec.filesystem("memory").pipe_file(f"/shards/{name}", data)
    assert [row for _, row in read_rows(only_shard(f"memory://shards/{name}"))] == ROWS
