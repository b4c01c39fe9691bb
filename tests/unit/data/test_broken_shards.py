"""Broken shards: each kind is told for its reason after the rows before the break, and the other shards go on."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import REASONS, Rejected
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.readers import arrow_rows, chunks, json_rows, locations
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import Shard, list_shards, pieces
from dpo_ray.errors import ConfigError, InfrastructureError
from tests.helpers.corpus import BAD_SHARDS, BadShard, sound_rows, write_escaping_data_set
from tests.unit.data.conftest import only_shard

ROWS = [{"prompt": f"Say {i}.", "chosen": f" good {random.Random(i).random()}", "rejected": " bad"} for i in range(400)]
LINES = [json.dumps(r).encode() for r in ROWS]
TEXT = b"\n".join(LINES) + b"\n"
GZIP, ZSTD = gzip.compress(TEXT), pa.compress(TEXT, "zstd", asbytes=True)


def parquet(rows: list = ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


def arrow(rows: list = ROWS, to: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    return arrow_of(pa.Table.from_pylist(rows), to)


def arrow_of(table: pa.Table, to: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    sink = pa.BufferOutputStream()
    with to(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return sink.getvalue().to_pybytes()


def csv_text() -> bytes:
    table = pa.Table.from_pylist(ROWS)
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(table, sink)
    return sink.getvalue().to_pybytes()


WHOLE = {
    "a.jsonl": TEXT,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.jsonl.gz": GZIP,
    "a.jsonl.zst": ZSTD,
    "a.csv": csv_text(),
    "a.parquet": parquet(),
    "a.arrow": arrow(),
    "file.arrow": arrow(to=pa.ipc.new_file),
}


def read(shard: Shard) -> list[tuple[int, Any]]:
    return [row for piece in pieces(shard) for batch in read_batches(piece, 64) for row in batch]


def values(shard: Shard) -> list[Any]:
    return [row for _, row in read(shard)]


def shards_of(directory: Path) -> list[Shard]:
    return list_shards("train", DataConfig.model_validate({"train": str(directory)}).train)


def reason_of(row: Any, shard: Shard) -> str | None:
    try:
        if isinstance(row, Rejected):
            raise row
        text_group(row, shard.row_format, shard.columns, shard.criteria)
    except Rejected as rejected:
        return rejected.reason
    return None


@pytest.mark.parametrize("bad", BAD_SHARDS, ids=lambda bad: f"{bad.kind}-{bad.file}")
def test_bad_shard_is_told_for_its_reason_and_leaves_its_neighbours(tmp_path: Path, bad: BadShard):
    for name in ("0.jsonl", "~.jsonl"):
        (tmp_path / name).write_bytes(TEXT)
    bad.write(tmp_path)
    first, shard, last = shards_of(tmp_path)
    assert values(first) == values(last) == ROWS
    rows = read(shard)
    assert [ordinal for ordinal, _ in rows] == list(range(len(rows)))
    reasons = [reason_of(row, shard) for _, row in rows]
    assert tuple(r for r in reasons if r is not None) == bad.reasons
    sound = [row for (_, row), reason in zip(rows, reasons, strict=True) if reason is None]
    assert sound == sound_rows(bad.file)[: len(sound)]
    assert bad.sound_rows in (None, len(sound))


def test_the_corpus_has_every_reason_of_shards():
    reasons = {reason for bad in BAD_SHARDS for reason in bad.reasons}
    assert {name for name in REASONS if name.startswith("SHARD_")} <= reasons
    assert len({bad.kind for bad in BAD_SHARDS}) >= 8


def test_sound_shards_beside_bad_ones_are_whole(tmp_path: Path, prepare):
    home = tmp_path / "home"
    home.mkdir()
    for bad in BAD_SHARDS:
        bad.write(home)
    (home / "sound.jsonl").write_bytes(TEXT)
    prepared = prepare(str(home), max_quarantined_fraction=1)
    assert prepared.reasons() == sorted(reason for bad in BAD_SHARDS for reason in bad.reasons)
    account = next(a for a in prepared.artifact.manifest.figures["accounts"] if a["source"] == "sound.jsonl")
    assert (account["rows_in"], account["admitted"]) == (len(ROWS), len(ROWS))
    assert not account["reasons"]


def test_data_set_that_names_a_file_outside_of_itself_is_refused(tmp_path: Path):
    write_escaping_data_set(tmp_path)
    with pytest.raises(ConfigError, match=r"outside the data set: '\.\./secret\.arrow'"):
        shards_of(tmp_path / "saved")


def test_plain_json_lines_of_zero_bytes_have_zero_rows(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(only_shard(f"{tmp_path}/a.jsonl")) == []


def test_file_that_vanished(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(TEXT)
    shard = only_shard(f"{tmp_path}/a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    ((_, row),) = read(shard)
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
        ((_, row),) = read(shard)
    finally:
        os.seteuid(before)
    assert (row.reason, "PermissionError" in row.detail) == ("SHARD_UNREADABLE", True)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_device_that_fails_while_reading(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    shard = only_shard(f"{tmp_path}/{name}")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/proc/self/mem")
    ((_, row),) = read(shard)
    assert row.reason == "SHARD_UNREADABLE"


@pytest.mark.parametrize("name", WHOLE)
def test_no_damage_crashes_the_reader(tmp_path: Path, name: str):
    data, path, rng = WHOLE[name], tmp_path / name, random.Random(name)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 10)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        ordinals = [ordinal for ordinal, _ in read(only_shard(str(path)))]
        assert ordinals == list(range(len(ordinals)))


def test_parquet_cell_that_is_not_utf8_costs_its_row_alone(tmp_path: Path):
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")
    prompts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    pq.write_table(pa.table({"prompt": prompts, "chosen": ["x"] * 3, "rejected": ["y"] * 3}), tmp_path / "a.parquet")
    rows = values(only_shard(f"{tmp_path}/a.parquet"))
    assert [r["prompt"] if isinstance(r, dict) else r.reason for r in rows] == ["a", "INVALID_UTF8", "c"]


def test_nested_text_of_arrow_that_is_not_utf8_costs_its_row_alone(tmp_path: Path):
    turns = [[{"role": "user", "content": text}] for text in (b"a", b"\xff", b"c")]
    as_bytes = pa.array(turns, pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary())])))
    as_text = as_bytes.view(pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
    (tmp_path / "a.arrow").write_bytes(arrow_of(pa.table({"chosen": as_text, "rejected": ["x", "y", "z"]})))
    rows = values(only_shard(f"{tmp_path}/a.arrow"))
    assert [r["chosen"][0]["content"] if isinstance(r, dict) else r.reason for r in rows] == ["a", "INVALID_UTF8", "c"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_row_of_a_table_that_is_longer_than_the_limit_costs_itself_alone(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arrow_rows, "MAX_ROW_BYTES", 500)
    rows = [*ROWS[:3], {"prompt": "p", "chosen": "x" * 600, "rejected": "r"}, *ROWS[3:6]]
    (tmp_path / name).write_bytes(parquet(rows) if name == "a.parquet" else arrow(rows))
    got = [r if isinstance(r, dict) else r.reason for r in values(only_shard(f"{tmp_path}/{name}"))]
    assert got == [*ROWS[:3], "TOO_LONG_BYTES", *ROWS[3:6]]


def test_extension_types_of_other_columns_and_json_are_no_hindrance(tmp_path: Path):
    identities = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16], pa.binary(16)))
    tools = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[]"]))
    table = pa.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"], "tools": tools, "id": identities})
    (tmp_path / "a.arrow").write_bytes(arrow_of(table))
    assert values(only_shard(f"{tmp_path}/a.arrow")) == [{"prompt": "p", "chosen": "c", "rejected": "r", "tools": "[]"}]


def test_line_longer_than_the_limit_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 500)
    for chunk_bytes in (7, 100, 499, 501, 1 << 20):  # the line ends within, at and beyond a chunk
        monkeypatch.setattr(chunks, "PLAIN_CHUNK_BYTES", chunk_bytes)
        for length in (501, 1500, 5000):
            lines = [LINES[0], b"x" * length, LINES[1], b"y" * length]
            (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
            rows = values(only_shard(f"{tmp_path}/a.jsonl"))
            got = [r if isinstance(r, dict) else r.reason for r in rows]
            expected = [ROWS[0], "TOO_LONG_BYTES", ROWS[1], "TOO_LONG_BYTES"]
            assert got == expected, (chunk_bytes, length)


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


@pytest.mark.parametrize("name", WHOLE)
def test_failing_remote_storage_stops_instead_of_giving_up_rows(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locations, "BUFFER_BYTES", 1000)
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    fsspec.filesystem("flaky").pipe_file(f"/{name}", WHOLE[name])
    FlakyFileSystem.reads = 0
    with pytest.raises(InfrastructureError, match="ConnectionResetError") as caught:
        read(only_shard(f"flaky:///{name}"))
    assert "flaky://" in caught.value.where


@pytest.mark.parametrize("name", WHOLE)
def test_remote_files_are_read_like_local_ones(name: str):
    fsspec.filesystem("memory").pipe_file(f"/shards/{name}", WHOLE[name])
    assert values(only_shard(f"memory://shards/{name}")) == ROWS
