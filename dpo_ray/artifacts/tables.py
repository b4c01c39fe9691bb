"""Tables in artifacts, stored as Parquet files. The bytes of a file depend only on the rows."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from .artifact import Artifact


def parquet_bytes(table: pa.Table) -> bytes:
    """Encode a table as Parquet; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(artifact: Artifact, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file of an artifact, checked as in `Artifact.open`; read only `columns` if they are set."""
    with artifact.open(name) as stream:
        return pq.ParquetFile(stream).read(columns=list(columns) if columns is not None else None)
