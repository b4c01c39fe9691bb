"""Tables as files of artifacts: Parquet whose bytes depend on the rows alone."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from .artifact import Artifact


def parquet_bytes(table: pa.Table) -> bytes:
    """Encode a table; the same table gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(artifact: Artifact, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file of an artifact, through its manifest."""
    with artifact.open(name) as stream:
        return pq.ParquetFile(stream).read(columns=list(columns) if columns is not None else None)
