"""Reads rows of Parquet files, Arrow files and hub data sets. Only the columns that a format needs are decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.errors import DataError

from .columns import columns_to_read
from .json_rows import MAX_ROW_BYTES

BATCH_ROWS = 256
BATCH_BYTES = 4 << 20
STREAM_BYTES = 1 << 20
_PARQUET_MAGIC = (b"PAR1", b"PARE")
_FILE_MAGIC, _STREAM_MAGIC = b"ARROW1", b"\xff\xff\xff\xff"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_PLAIN_EXTENSIONS = ("arrow.json",)  # extension types that are stored as plain text


def parquet_rows(raw: Any, columns: Columns, start: int, stop: int | None) -> Iterator[tuple[Any, int]]:
    """Yield (row, size in bytes) for each row of the Parquet row groups [start, stop). An unreadable row is replaced by `Rejected`.

    Raises:
        Rejected: SHARD_EMPTY, SHARD_BAD_MAGIC, SHARD_TRUNCATED, SHARD_DAMAGED, SHARD_DUPLICATE_COLUMN or
            SHARD_ARROW_EXTENSION.
    """
    _check_ends(raw, _PARQUET_MAGIC, _PARQUET_MAGIC)
    try:
        # A local file's pages are read one by one, so that a large row group is not held in memory as a whole; from a
        # remote file each column is fetched in one request.
        buffer_bytes = STREAM_BYTES if hasattr(raw, "fileno") else 0
        file = pq.ParquetFile(raw, buffer_size=buffer_bytes, pre_buffer=False, page_checksum_verification=True)
        chosen = _checked_columns(file.schema_arrow, columns)
        groups = range(start, file.num_row_groups if stop is None else stop)
        for group in groups:
            batches = file.iter_batches(_batch_rows(file, group), [group], chosen, use_threads=False)
            for batch in batches:
                yield from _records(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(error) from error


def arrow_rows(raw: Any, columns: Columns) -> Iterator[tuple[Any, int]]:
    """Yield (row, size in bytes) for each row of an Arrow file or stream. An unreadable row is replaced by `Rejected`.

    `datasets` writes Arrow streams.

    Raises:
        Rejected: with the same reasons as in `parquet_rows`.
    """
    _check_ends(raw, (_FILE_MAGIC, _STREAM_MAGIC), ())
    try:
        for batch in _arrow_batches(raw):
            chosen = batch.select(_checked_columns(batch.schema, columns))
            _check_structure(chosen)  # otherwise a damaged offset would be followed out of its buffer
            for part in _slices(chosen):
                yield from _records(part)
    except (pa.ArrowInvalid, OSError) as error:
        if not raw.read(1):  # decoding failed at the end of the file
            raise Rejected("SHARD_TRUNCATED", str(error)) from error
        raise _damaged(error) from error


def hub_rows(what: Mapping[str, Any], columns: Columns) -> Iterator[tuple[Any, int]]:
    """Download a hub data set to the local cache, and yield (row, size in bytes). An unreadable row is replaced by `Rejected`.

    Raises:
        DataError: the data set cannot be loaded.
        Rejected: SHARD_DUPLICATE_COLUMN or SHARD_ARROW_EXTENSION.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(what["path"], what["subset"], split=what["split"], revision=what["revision"])
    except Exception as error:  # the hub's client raises many kinds; all mean that the data cannot be loaded
        raise DataError(
            f"the data set cannot be loaded: {error}",
            where=f"hub:{what['path']}",
            fix="check the name, the split, the network and HF_TOKEN",
        ) from error
    chosen = columns_to_read(loaded.column_names, columns)
    for table in loaded.select_columns(chosen).with_format("arrow").iter(BATCH_ROWS):
        _checked_columns(table.schema, columns)
        for batch in table.to_batches():
            yield from _records(batch)


def _check_ends(raw: Any, begins: tuple[bytes, ...], ends: tuple[bytes, ...]) -> None:
    """Check that a file begins and ends with the magic bytes of its kind, Parquet or Arrow."""
    head = raw.read(8)
    if not head:
        raise Rejected("SHARD_EMPTY", "the file has zero bytes")
    if not head.startswith(begins):
        raise Rejected("SHARD_BAD_MAGIC", f"the file begins with {head!r}")
    ends = (_FILE_MAGIC,) if head.startswith(_FILE_MAGIC) else ends
    if ends:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(max(size - len(ends[0]), len(begins[0])))
        tail = raw.read(len(ends[0]))
        if tail not in ends:
            raise Rejected("SHARD_TRUNCATED", f"the file ends with {tail!r}")
    raw.seek(0)


def _damaged(error: Exception) -> Exception:
    """Convert an error of the decoder to Rejected. Return a read error (an error with an errno) unchanged."""
    return error if getattr(error, "errno", None) is not None else Rejected("SHARD_DAMAGED", str(error))


def _checked_columns(schema: pa.Schema, columns: Columns) -> list[str]:
    """Return the columns to read.

    Raises:
        Rejected: SHARD_DUPLICATE_COLUMN or SHARD_ARROW_EXTENSION, if one of these columns cannot be read.
    """
    chosen = columns_to_read(schema.names, columns)
    for name in chosen:
        if extension := _extension(schema.field(name)):
            raise Rejected("SHARD_ARROW_EXTENSION", f"column `{name}` has the type {extension}"[:300])
    return chosen


def _extension(field: pa.Field) -> str:
    """Return the name of the Arrow extension type of a field, or of a field inside it; "" if there is none.

    The name of an extension type that pyarrow does not support is only in the metadata of the field.
    """
    if isinstance(field.type, pa.BaseExtensionType):
        name = field.type.extension_name
        return "" if name in _PLAIN_EXTENSIONS else name
    if name := (field.metadata or {}).get(b"ARROW:extension:name", b"").decode("utf-8", "replace"):
        return "" if name in _PLAIN_EXTENSIONS else name
    return next(filter(None, (_extension(field.type.field(i)) for i in range(field.type.num_fields))), "")


def _batch_rows(file: pq.ParquetFile, group: int) -> int:
    """Compute how many rows to decode at once, from the mean size of a row in this Parquet row group."""
    metadata = file.metadata.row_group(group)
    mean_bytes = max(metadata.total_byte_size, 1) / max(metadata.num_rows, 1)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / mean_bytes)))


def _arrow_batches(raw: Any) -> Iterator[pa.RecordBatch]:
    is_file = raw.read(6) == _FILE_MAGIC
    raw.seek(0)
    if is_file:
        with pa.ipc.open_file(raw) as reader:
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)
        return
    with pa.ipc.open_stream(raw) as reader:
        yield from reader
    raw.seek(-len(_END_OF_STREAM), os.SEEK_CUR)
    if raw.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise Rejected("SHARD_TRUNCATED", "the mark of the stream's end is missing")


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    return (batch.slice(i, BATCH_ROWS) for i in range(0, batch.num_rows, BATCH_ROWS))


def _check_structure(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid if an offset points outside its buffer.

    Text that is not UTF-8 raises no error here: it affects only its own row, which is rejected later.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for column in batch.columns:
            column.view(_as_bytes(column.type)).validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type `kind`, in which each text type is replaced by the byte type with the same memory layout."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    return kind


def _records(batch: pa.RecordBatch) -> Iterator[tuple[Any, int]]:
    """Convert a batch to rows. If that fails, convert the rows one by one, so that a bad value affects only its own row."""
    rows, sparse = _at_once(batch), [f.name for f in batch.schema if _may_lack_fields(f.type)]
    if rows is not None:
        mean_bytes = batch.nbytes // max(len(rows), 1)
        yield from ((_without_absent(row, sparse), mean_bytes) for row in rows)
        return
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        yield _without_absent(_record(row), sparse), row.nbytes


def _may_lack_fields(kind: pa.DataType) -> bool:
    """Return whether a null in a value of this type may stand for a field that the original object did not have.

    A struct column stores objects with different fields as structs with all these fields; null stands for a field that
    the object did not have. Structs of at most two fields, such as a message's role and content, are taken as complete.
    """
    if pa.types.is_struct(kind) and kind.num_fields > 2:
        return True
    return any(_may_lack_fields(kind.field(i).type) for i in range(kind.num_fields))


def _without_absent(row: Any, names: Sequence[str]) -> Any:
    """Remove the fields that are null from all objects inside the columns `names` of a row."""
    if not names or not isinstance(row, dict):
        return row
    return {name: _present(value) if name in names else value for name, value in row.items()}


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _present(v) for k, v in value.items() if v is not None}
    return [_present(v) for v in value] if isinstance(value, list) else value


def _at_once(batch: pa.RecordBatch) -> list[Any] | None:
    if batch.nbytes > MAX_ROW_BYTES:
        return None
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except Exception:  # text that is not UTF-8, or a time that Python cannot represent: handled again for its row
        return None


def _record(row: pa.RecordBatch) -> Any:
    if row.nbytes > MAX_ROW_BYTES:
        return Rejected("TOO_LONG_BYTES", f"the row has {row.nbytes} bytes")
    try:
        return row.to_pylist(maps_as_pydicts="strict")[0]
    except UnicodeDecodeError as error:
        return Rejected("INVALID_UTF8", f"byte {error.start} is not UTF-8: {error.object[:100]!r}")
    except Exception as error:
        return Rejected("WRONG_TYPE", f"{type(error).__name__}: {error}"[:300])
