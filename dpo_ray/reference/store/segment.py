"""A segment of the reference store: a Parquet file of keys and token log-probs that is read whole or refused."""

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
ROWS_PER_ROW_GROUP = 8192  # what a reader that wants a single row has to read
MAX_LOGP = 1e-4  # nats; a certain token's log-prob may round to a little above 0
_NAME = re.compile(r"segment-([0-9a-f]{16})-[0-9a-f]{16}\.parquet")


def new_name(stamp_nanoseconds: int | None = None) -> str:
    """Name a segment: by the time, so that the listing has the oldest first, and by chance, so that writers never meet."""
    stamp = time.time_ns() if stamp_nanoseconds is None else stamp_nanoseconds
    return f"segment-{stamp:016x}-{uuid.uuid4().hex[:16]}.parquet"


def stamp_nanoseconds(name: str) -> int | None:
    """Return the Unix time at which a segment was made, None where the name is no segment's."""
    match = _NAME.fullmatch(name)
    return int(match[1], 16) if match else None


def are_logps(values: np.ndarray) -> bool:
    """Say whether all values can be log-probs: finite and not above 0."""
    return bool(np.isfinite(values).all() and (values <= MAX_LOGP).all())


def to_bytes(keys: pa.FixedSizeBinaryArray, token_logps: pa.ListArray) -> bytes:
    """Write a segment: keys [n] and float32 lists [n]. Its pages have checksums."""
    sink = io.BytesIO()
    pq.write_table(
        pa.table([keys, token_logps], schema=SEGMENT),
        sink,
        row_group_size=ROWS_PER_ROW_GROUP,
        compression="zstd",
        use_dictionary=False,  # neither column has values that occur twice
        write_page_checksum=True,
    )
    return sink.getvalue()


def read_keys(partition: Storage, name: str) -> np.ndarray:
    """Read a segment's keys, and nothing else of it: KEY [n].

    Raises:
        ArtifactError: the file is damaged, or no segment.
        FileNotFoundError: it is not there (any more).
    """
    return _read(partition, name, lambda file: key_array(file.read(["key"])["key"]))


def read_values(partition: Storage, name: str, rows: np.ndarray) -> pa.ListArray:
    """Read the log-probs of some rows, reading only the row groups in which they lie.

    Args:
        rows: int64 [m], rising; a row may be asked for twice.

    Raises:
        ArtifactError: the file is damaged, or no segment.
        FileNotFoundError: it is not there (any more).
    """
    return _read(partition, name, lambda file: _values(file, rows))


def read_whole(partition: Storage, name: str) -> tuple[np.ndarray, pa.ListArray]:
    """Read and check all of a segment: KEY [n] and float32 lists [n].

    The bytes are fetched first and decoded then, so a network that fails is never taken for damage.

    Raises:
        ArtifactError: the file is damaged, no segment, or holds what is no log-prob.
        FileNotFoundError: it is not there (any more).
    """
    data = partition.read_bytes(name)

    def decode(file: pq.ParquetFile) -> tuple[np.ndarray, pa.ListArray]:
        table = file.read()
        values = _list_array(table["token_logps"])
        if not are_logps(values.values.to_numpy()):
            raise ValueError("it holds values that are no log-probs")
        return key_array(table["key"]), values

    return _decoded(partition, name, io.BytesIO(data), decode)


def read_size(partition: Storage, name: str) -> tuple[int, int]:
    """Return a segment's sequences and tokens, from its footer alone; raises what `read_keys` raises."""

    def size(file: pq.ParquetFile) -> tuple[int, int]:
        footer = file.metadata
        return footer.num_rows, sum(footer.row_group(g).column(1).num_values for g in range(footer.num_row_groups))

    return _read(partition, name, size)


def key_array(column: pa.ChunkedArray | pa.FixedSizeBinaryArray) -> np.ndarray:
    """Give a column of keys as an array of KEY."""
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
    """Give an array of KEY as a column."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY.itemsize), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )


def _values(file: pq.ParquetFile, rows: np.ndarray) -> pa.ListArray:
    footer = file.metadata
    ends = np.cumsum([footer.row_group(g).num_rows for g in range(footer.num_row_groups)])
    if len(rows) and (not len(ends) or rows[-1] >= ends[-1]):
        raise ValueError("it has fewer rows than it had")
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
            raise ValueError(f"its columns are {file.schema_arrow.names}")
        return decode(file)
    except (FileNotFoundError, DpoRayError):
        raise
    except Exception as error:  # Arrow's own kinds, and whatever an object store's client raises while it is read
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if not _is_damage(error):
            raise InfrastructureError(
                f"a segment of the reference store cannot be read: {first_line}",
                where=partition.full_path(name),
                fix="mend the cause and run again; what is in the store is kept",
            ) from error
        raise ArtifactError(
            f"a segment of the reference store is damaged: {first_line}",
            where=partition.full_path(name),
            fix="delete that file and run again: what is missing is scored",
        ) from error


def _is_damage(error: Exception) -> bool:
    """Tell bytes that make no sense from a disk or network that fails: those have an error number, or are timeouts."""
    if isinstance(error, OSError):
        return type(error) is OSError and error.errno is None
    return isinstance(error, pa.ArrowException | ValueError)
