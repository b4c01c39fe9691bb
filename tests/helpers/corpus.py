"""Bad shards, made by small functions: of each its kind, the file, and the reasons that its rows must be given.

A shard holds ten sound rows before its damage is done. Its rows are its own, so that no shard's are duplicates of another's.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 10


@dataclass(frozen=True)
class BadShard:
    """`reasons` are those of the rows that are not sound, in order; None says that it varies how many rows come before."""

    kind: str
    file: str
    data: bytes | None  # None: a link to nothing
    reasons: tuple[str, ...]
    sound_rows: int | None = 0

    def write(self, directory: Path) -> Path:
        """Make the file."""
        path = directory / self.file
        if self.data is None:
            path.symlink_to(directory / "nowhere")
        else:
            path.write_bytes(self.data)
        return path


def sound_rows(name: str, count: int = ROWS) -> list[dict[str, Any]]:
    """Make rows that only the shard `name` has."""
    return [{"prompt": f"{name}: say {i}.", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(count)]


def json_lines(name: str) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in sound_rows(name))


def pretty(name: str) -> bytes:
    return "\n".join(json.dumps(row, indent=1) for row in sound_rows(name)).encode()


def gzipped(name: str) -> bytes:
    return gzip.compress(json_lines(name), mtime=0)


def zstandard(name: str) -> bytes:
    return pa.compress(json_lines(name), "zstd", asbytes=True)


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(table: pa.Table, batch_rows: int = 5, to: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    sink = pa.BufferOutputStream()
    with to(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return sink.getvalue().to_pybytes()


def table(name: str) -> pa.Table:
    return pa.Table.from_pylist(sound_rows(name))


def with_extension(name: str) -> pa.Table:
    """Mark `chosen` as of an extension type, as a program writes it that has registered one."""
    metadata = {"ARROW:extension:name": "someone.tensor", "ARROW:extension:metadata": "code"}
    schema = pa.schema(
        [pa.field(f.name, f.type, metadata=metadata if f.name == "chosen" else None) for f in table(name).schema]
    )
    return pa.table(table(name).columns, schema=schema)


def flipped(data: bytes, place: int) -> bytes:
    """Change one bit."""
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def _bad_shards() -> list[BadShard]:
    columns = table("two.parquet").columns
    doubled = pa.table([*columns, columns[1]], names=["prompt", "chosen", "rejected", "chosen"])
    checked = parquet(table("page.parquet"), write_page_checksum=True, compression="none", use_dictionary=False)
    drifted = table("drift.parquet").set_column(1, "chosen", pa.array(range(ROWS)))
    as_list = {name: b"[" + b",".join(json_lines(name).splitlines()) for name in ("list.json", "brackets.json")}
    crossed = as_list["brackets.json"].replace(b"3.", b'3."]', 1) + b"]"
    no_end = arrow(table("endless.arrow"))[:-8]
    return [
        BadShard("ZERO_BYTES", "zero.parquet", b"", ("SHARD_EMPTY",)),
        BadShard("ZERO_BYTES", "zero.arrow", b"", ("SHARD_EMPTY",)),
        BadShard("ZERO_BYTES", "zero.jsonl.gz", b"", ("SHARD_EMPTY",)),
        BadShard("ZERO_BYTES", "zero.jsonl.zst", b"", ("SHARD_EMPTY",)),
        BadShard("ZERO_BYTES", "zero.csv", b"", ("SHARD_EMPTY",)),
        BadShard("BAD_MAGIC", "magic.parquet", b"RIFF" + parquet(table("magic.parquet"))[4:], ("SHARD_BAD_MAGIC",)),
        BadShard("BAD_MAGIC", "text.arrow", json_lines("text.arrow"), ("SHARD_BAD_MAGIC",)),
        BadShard("TRUNCATED_FOOTER", "cut.parquet", parquet(table("cut.parquet"))[:-20], ("SHARD_TRUNCATED",)),
        BadShard("TRUNCATED_FOOTER", "cut-file.arrow", arrow(table("cut-file.arrow"), to=pa.ipc.new_file)[:-20], ("SHARD_TRUNCATED",)),
        BadShard("TRUNCATED", "cut.jsonl.gz", gzipped("cut.jsonl.gz")[:-20], ("SHARD_TRUNCATED",), None),
        BadShard("TRUNCATED", "head.jsonl.gz", gzipped("head.jsonl.gz")[:4], ("SHARD_TRUNCATED",)),
        BadShard("TRUNCATED", "cut.jsonl.zst", zstandard("cut.jsonl.zst")[:-20], ("SHARD_TRUNCATED",), None),
        BadShard("TRUNCATED", "cut.arrow", arrow(table("cut.arrow"))[:-100], ("SHARD_TRUNCATED",), 5),
        BadShard("TRUNCATED", "endless.arrow", no_end, ("SHARD_TRUNCATED",), ROWS),
        BadShard("TRUNCATED", "list.json", as_list["list.json"], ("SHARD_TRUNCATED",), ROWS - 1),
        BadShard("BIT_FLIP", "sum.jsonl.gz", flipped(gzipped("sum.jsonl.gz"), -6), ("SHARD_DAMAGED",), ROWS),
        BadShard("BIT_FLIP", "after.jsonl.gz", gzipped("after.jsonl.gz") + b"garbage", ("SHARD_DAMAGED",), ROWS),
        BadShard("BIT_FLIP", "page.parquet", flipped(checked, checked.index(b"page.parquet: say 3")), ("SHARD_DAMAGED",)),
        BadShard("BIT_FLIP", "brackets.json", crossed, ("SHARD_DAMAGED",), 3),
        BadShard("SCHEMA_DRIFT", "drift.parquet", parquet(drifted), ("WRONG_TYPE",) * ROWS),
        BadShard("DUPLICATE_COLUMN", "two.parquet", parquet(doubled), ("SHARD_DUPLICATE_COLUMN",)),
        BadShard("DUPLICATE_COLUMN", "two.csv", b"chosen,rejected,chosen\r\na,b,c\r\n", ("SHARD_DUPLICATE_COLUMN",)),
        BadShard("WRONG_COMPRESSION", "zstd.jsonl.gz", zstandard("zstd.jsonl.gz"), ("SHARD_COMPRESSION",)),
        BadShard("WRONG_COMPRESSION", "plain.jsonl.zst", json_lines("plain.jsonl.zst"), ("SHARD_COMPRESSION",)),
        BadShard("WRONG_COMPRESSION", "gzip.jsonl", gzipped("gzip.jsonl"), ("SHARD_COMPRESSION",)),
        BadShard("ENCODING", "utf16.jsonl", json_lines("utf16.jsonl").decode().encode("utf-16"), ("SHARD_ENCODING",)),
        BadShard("ENCODING", "utf16le.jsonl", json_lines("utf16le.jsonl").decode().encode("utf-16-le"), ("SHARD_ENCODING",)),
        BadShard("ENCODING", "utf16be.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16-be"), ("SHARD_ENCODING",)),
        BadShard("ENCODING", "utf32.jsonl.gz", gzip.compress(json_lines("x").decode().encode("utf-32")), ("SHARD_ENCODING",)),
        BadShard("PRETTY", "pretty.json", pretty("pretty.json"), ("SHARD_PRETTY",)),
        BadShard("PRETTY", "windows.jsonl", pretty("windows.jsonl").replace(b"\n", b"\r\n"), ("SHARD_PRETTY",)),
        BadShard("UNWRITTEN_BLOCK", "zeros.csv", b"\0" * 512 + b"prompt,chosen,rejected\r\na,b,c\r\n", ("SHARD_DAMAGED",)),
        BadShard("UNWRITTEN_BLOCK", "zeros.jsonl", b"\0" * 512 + b"\n" + json_lines("zeros.jsonl"), ("JSON_SYNTAX",), ROWS),
        BadShard("UNREADABLE", "link.jsonl", None, ("SHARD_UNREADABLE",)),
        BadShard("UNEXPECTED_ARROW_EXTENSION", "tensor.arrow", arrow(with_extension("tensor.arrow")), ("SHARD_ARROW_EXTENSION",)),
        BadShard("UNEXPECTED_ARROW_EXTENSION", "tensor.parquet", parquet(with_extension("tensor.parquet")), ("SHARD_ARROW_EXTENSION",)),
    ]  # fmt: skip


BAD_SHARDS = _bad_shards()


def write_escaping_data_set(directory: Path) -> None:
    """Write a saved data set whose state names a file outside of it (PATH_ESCAPE)."""
    os.makedirs(directory / "saved")
    (directory / "secret.arrow").write_bytes(arrow(table("secret.arrow")))
    (directory / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
