"""A segment of the reference store: a Parquet file with keys and the token log-probs of each key.

A reader gets valid data or an error.
"""

from __future__ import annotations

import io
import re
import time
import uuid
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError, DpoRayError, InfrastructureError

from .index import KEY

T = TypeVar("T")
TOKEN_LOGPS = pa.list_(pa.float32())
SEGMENT = pa.schema([("key", pa.binary(KEY.itemsize)), ("token_logps", TOKEN_LOGPS)])
ROWS_PER_ROW_GROUP = 8192  # to read a single row, a reader must read all rows of its row group
MAX_LOGP = 1e-4  # nats; rounding may put the log-prob of a token with probability 1 slightly above 0
_NAME = re.compile(r"segment-([0-9a-f]{16})-[0-9a-f]{16}\.parquet")


def new_name(stamp_nanoseconds: int | None = None) -> str:
    """Build the name of a segment from a Unix time (None: now) and random digits.

    Because of the time, sorted names list the oldest segment first. Because of the digits, two writers never choose
    the same name.
    """
    stamp = time.time_ns() if stamp_nanoseconds is None else stamp_nanoseconds
    return f"segment-{stamp:016x}-{uuid.uuid4().hex[:16]}.parquet"


def stamp_nanoseconds(name: str) -> int | None:
    """Return the Unix time in the name of a segment; None if this is not the name of a segment."""
    match = _NAME.fullmatch(name)
    return int(match[1], 16) if match else None


def are_logps(values: np.ndarray) -> bool:
    """Return whether all values can be log-probs: finite and not above 0 (except for rounding)."""
    return bool(np.isfinite(values).all() and (values <= MAX_LOGP).all())


def to_bytes(keys: pa.FixedSizeBinaryArray, token_logps: pa.ListArray) -> bytes:
    """Build the bytes of a segment (a Parquet file with page checksums) from keys [n] and lists of log-probs [n]."""
    sink = io.BytesIO()
    pq.write_table(
        pa.table([keys, token_logps], schema=SEGMENT),
        sink,
        row_group_size=ROWS_PER_ROW_GROUP,
        compression="zstd",
        use_dictionary=False,  # values rarely repeat in either column
        write_page_checksum=True,
    )
    return sink.getvalue()


def read_keys(partition: Storage, name: str) -> np.ndarray:
    """Read only the keys of a segment: KEY [n].

    Raises:
        ArtifactError: the file is damaged or is not a segment.
        FileNotFoundError: the file does not exist, or has been deleted.
    """
    return _read(partition, name, lambda file: key_array(file.read(["key"])["key"]))


def read_values(partition: Storage, name: str, rows: np.ndarray) -> pa.ListArray:
    """Read the log-probs in some rows of a segment. Only the row groups that contain these rows are read.

    Args:
        rows: int64 [m], ascending; a row may occur twice.

    Raises:
        ArtifactError: the file is damaged or is not a segment.
        FileNotFoundError: the file does not exist, or has been deleted.
    """
    return _read(partition, name, lambda file: _values(file, rows))


def read_whole(partition: Storage, name: str) -> tuple[np.ndarray, pa.ListArray]:
    """Read and check a complete segment; return its keys (KEY [n]) and its lists of log-probs (float32) [n].

    All bytes are fetched before they are decoded, so that a network failure is never mistaken for a damaged file.

    Raises:
        ArtifactError: the file is damaged, is not a segment, or contains values that cannot be log-probs.
        FileNotFoundError: the file does not exist, or has been deleted.
    """
    data = partition.read_bytes(name)

    def decode(file: pq.ParquetFile) -> tuple[np.ndarray, pa.ListArray]:
        table = file.read()
        values = _list_array(table["token_logps"])
        if not are_logps(values.values.to_numpy()):
            raise ValueError("the file contains values that cannot be log-probs")
        return key_array(table["key"]), values

    return _decoded(partition, name, io.BytesIO(data), decode)


def read_size(partition: Storage, name: str) -> tuple[int, int]:
    """Return the number of sequences and the number of tokens in a segment. Only the file's footer is read.

    Raises:
        ArtifactError, FileNotFoundError: for the same reasons as `read_keys`.
    """

    def size(file: pq.ParquetFile) -> tuple[int, int]:
        footer = file.metadata
        return footer.num_rows, sum(footer.row_group(g).column(1).num_values for g in range(footer.num_row_groups))

    return _read(partition, name, size)


def key_array(column: pa.ChunkedArray | pa.FixedSizeBinaryArray) -> np.ndarray:
    """Convert an Arrow column of keys to an array of dtype KEY.

    Raises:
        ValueError: a key is null.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    if any(chunk.null_count for chunk in chunks):
        raise ValueError("a key is missing")
    arrays = [
        np.frombuffer(chunk.buffers()[1], KEY, len(chunk), chunk.offset * KEY.itemsize)
        for chunk in chunks
        if len(chunk)
    ]
    return np.concatenate([np.empty(0, KEY), *arrays])


def key_column(keys: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Convert an array of keys (dtype KEY) to an Arrow column."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY.itemsize), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )


def _values(file: pq.ParquetFile, rows: np.ndarray) -> pa.ListArray:
    footer = file.metadata
    ends = np.cumsum([footer.row_group(g).num_rows for g in range(footer.num_row_groups)])
    if len(rows) and (not len(ends) or rows[-1] >= ends[-1]):
        raise ValueError("the file has fewer rows than when its keys were read")
    group_of_row = np.searchsorted(ends, rows, side="right")
    groups = np.unique(group_of_row)
    sizes = np.diff(ends, prepend=0)[groups]
    starts_in_file, starts_here = ends[groups] - sizes, np.cumsum(sizes) - sizes
    here = rows + (starts_here - starts_in_file)[np.searchsorted(groups, group_of_row)]
    return _list_array(file.read_row_groups(groups.tolist(), ["token_logps"])["token_logps"]).take(pa.array(here))


def _list_array(column: pa.ChunkedArray) -> pa.ListArray:
    values = column.combine_chunks()
    values = values if isinstance(values, pa.ListArray) else pa.concat_arrays(values.chunks)
    if values.null_count or values.values.null_count:
        raise ValueError("a log-prob is missing")
    return values


def _read(partition: Storage, name: str, decode: Callable[[pq.ParquetFile], T]) -> T:
    with partition.open_input(name) as stream:
        return _decoded(partition, name, stream, decode)


def _decoded(partition: Storage, name: str, stream: BinaryIO, decode: Callable[[pq.ParquetFile], T]) -> T:
    try:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        if not file.schema_arrow.equals(SEGMENT):
            raise ValueError(f"the file has the wrong columns: {file.schema_arrow.names}")
        return decode(file)
    except (FileNotFoundError, DpoRayError):
        raise
    except Exception as error:  # Arrow's own exceptions, and any that an object store's client raises during reading
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if not _is_damage(error):
            raise InfrastructureError(
                f"a segment of the reference store cannot be read: {first_line}",
                where=partition.full_path(name),
                fix="fix the cause and run again; the store's contents are kept",
            ) from error
        raise ArtifactError(
            f"a segment of the reference store is damaged: {first_line}",
            where=partition.full_path(name),
            fix="delete that file and run again: its sequences will be scored again",
        ) from error


def _is_damage(error: Exception) -> bool:
    """Return whether an error of reading a file means that the file's bytes are damaged.

    All other errors mean that the disk or the network failed. They have an error number, or are timeouts.
    """
    if isinstance(error, OSError):
        return type(error) is OSError and error.errno is None
    return isinstance(error, pa.ArrowException | ValueError)
