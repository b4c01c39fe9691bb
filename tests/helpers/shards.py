"""The same rows in a file of every kind."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.config.data import DataConfig
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import Shard, list_shards, pieces
from tests.unit.data.conftest import only_shard

ROWS = [{"prompt": f"p{i}\n", "chosen": "é" * i + 'a"\\', "rejected": "b, [{"} for i in range(600)]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()


def shards_of(train: object) -> list[Shard]:
    return list_shards("train", DataConfig.model_validate({"train": train}).train)


def rows_in(shard: Shard, **bounds: int) -> list[Any]:
    return [
        row
        for piece in pieces(shard)
        for batch in read_batches(piece, **{"max_rows": 50, **bounds})
        for _, row in batch
    ]


def rows_of(path: Path | str, **source: object) -> list[Any]:
    return rows_in(only_shard(str(path), **source))


def arrow_file() -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return sink.getvalue()


def parquet_file() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=70)
    return sink.getvalue()


def csv_file(**dialect: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), **dialect)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zstd(*texts: bytes) -> bytes:
    return b"".join(pa.compress(text, "zstd", asbytes=True) for text in texts)


AS_LIST = json.dumps(ROWS, ensure_ascii=False).encode()
FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "bom.json": b"\xef\xbb\xbf" + LINES,
    "unended.jsonl": LINES.rstrip(),
    "blank-lines.jsonl": LINES.replace(b"\n", b"\n\n  \n"),
    "UPPER.JSONL": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "members.json.gz": gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:]),
    "a.jsonl.zst": zstd(LINES),
    "frames.json.zst": zstd(LINES[:999], LINES[999:]),
    "list.json": AS_LIST,
    "indented.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=4).encode() + b"\n",
    "list.jsonl": AS_LIST,
    "list.json.gz": gzip.compress(AS_LIST),
    "list.json.zst": zstd(AS_LIST),
    "a.csv": csv_file(),
    "unix.csv": csv_file(lineterminator="\n", quoting=csv.QUOTE_ALL),
    "bom.csv": b"\xef\xbb\xbf" + csv_file(),
    "unended.csv": csv_file().rstrip(),
    "a.csv.gz": gzip.compress(csv_file()),
    "a.csv.zst": zstd(csv_file()),
    "a.tsv": csv_file(delimiter="\t"),
    "a.tsv.gz": gzip.compress(csv_file(delimiter="\t")),
    "a.parquet": parquet_file(),
    "file.arrow": arrow_file(),
}
