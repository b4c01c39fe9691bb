"""The rows of a shard, read so that what is damaged costs no more than itself."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.config.data import Columns
from dpo_ray.errors import DataError, DpoRayError, InfrastructureError

from . import synthetic
from .admission import Rejected
from .sources import Shard, protocols

MAX_ROW_BYTES = 16 << 20
PLAIN_CHUNK_BYTES = 1 << 20
COMPRESSED_CHUNK_BYTES = 64 << 10  # what is read at once; where a file breaks off, at most this much before it is lost


def read_rows(shard: Shard) -> Iterator[tuple[int, Any]]:
    """Yield (ordinal, row) for every row; a row that cannot be read is a `Rejected`, and its neighbours go on.

    Where the shard itself breaks off, the last item is a `Rejected` with SHARD_UNREADABLE.

    Raises:
        InfrastructureError: a remote storage failed while it was read; the data itself may be sound.
        DataError: a data set of the hub cannot be had.
    """
    ordinal = -1
    try:
        for ordinal, row in enumerate(_rows(shard)):
            yield ordinal, row
    except DpoRayError:
        raise
    except Exception as error:  # a damaged file can raise anything; its account says what
        yield ordinal + 1, Rejected("SHARD_UNREADABLE", f"{type(error).__name__}: {error}"[:300])


def _rows(shard: Shard) -> Iterable[Any]:
    match shard.kind:
        case "jsonl":
            with _opened(shard.location) as raw:
                yield from map(_parse_line, _lines(_chunks(raw, shard.location)))
        case "parquet":
            with _opened(shard.location) as raw:
                file = pq.ParquetFile(raw)
                wanted = _wanted(file.schema_arrow.names, shard.columns)
                for batch in file.iter_batches(batch_size=256, columns=wanted):
                    yield from _records(batch)
        case "arrow":
            with _opened(shard.location) as raw:
                for batch in _arrow_batches(raw):
                    batch.validate(full=True)  # a damaged offset would otherwise be followed out of the buffer
                    yield from _records(batch.select(_wanted(batch.schema.names, shard.columns)))
        case "synthetic":
            what = json.loads(shard.location)
            yield from synthetic.preference_pairs(what["pairs"], what["seed"], shard.split)
        case "hub":
            yield from _hub_rows(json.loads(shard.location))


def _wanted(names: Sequence[str], columns: Columns) -> list[str]:
    """Choose the columns to decode: those that a row is made of, or all where some are missing, to be able to say so."""
    wanted = [c for c in dict.fromkeys((columns.prompt, columns.chosen, columns.rejected)) if c in names]
    for column in wanted:
        if names.count(column) > 1:
            raise ValueError(f"there are {names.count(column)} columns `{column}`")
    return wanted if columns.chosen in wanted and columns.rejected in wanted else list(dict.fromkeys(names))


def _arrow_batches(raw: Any) -> Iterator[pa.RecordBatch]:
    """Read an Arrow stream (`datasets` writes these) or an Arrow file."""
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    if not is_file:
        with pa.ipc.open_stream(raw) as reader:
            yield from reader
        return
    with pa.ipc.open_file(raw) as reader:
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _records(batch: pa.RecordBatch) -> list[Any]:
    """Convert a batch to rows; where that fails, one by one, so that a bad value costs its own row alone."""
    try:
        return batch.to_pylist()
    except Exception:  # text that is not UTF-8, a time that Python has no value for
        return [_record(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _record(row: pa.RecordBatch) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Rejected("INVALID_UTF8", f"byte {error.start}: {error.object[:100]!r}")
    except Exception as error:
        return Rejected("WRONG_TYPE", f"{type(error).__name__}: {error}"[:300])


def _hub_rows(what: dict[str, Any]) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(what["name"], what["subset"], split=what["split"], revision=what["revision"])
    except Exception as error:  # the hub's client raises many kinds; all mean that the data cannot be had
        raise DataError(
            f"cannot be loaded: {error}", where=f"hub:{what['name']}", fix="check name, split, network and HF_TOKEN"
        ) from error


@contextmanager
def _opened(location: str) -> Iterator[Any]:
    """Open a file for reading in bytes; on a remote storage, tell its failures from those of the data."""
    fs, path = fsspec.core.url_to_fs(location)
    if "file" in protocols(fs):
        with open(path, "rb") as raw:
            yield raw
        return
    try:
        raw = fs.open(path, "rb")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise _failing_storage(location, error) from error
    with raw:
        yield _RemoteFile(raw, location)


class _RemoteFile:
    """A file on a remote storage, whose failures are the storage's: rows must not be given up for them."""

    def __init__(self, raw: Any, location: str) -> None:
        self._raw, self._location = raw, location

    def read(self, size: int = -1) -> bytes:
        """Read; raise InfrastructureError where the storage fails."""
        try:
            return self._raw.read(size)
        except Exception as error:
            raise _failing_storage(self._location, error) from error

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the file."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file."""
        return self._raw.tell()

    def close(self) -> None:
        """Leave the closing to the one who opened it."""

    closed, seekable, readable = False, lambda self: True, lambda self: True


def _failing_storage(location: str, error: Exception) -> InfrastructureError:
    return InfrastructureError(
        f"reading failed: {type(error).__name__}: {error}"[:300], where=location, fix="run the same command again"
    )


def _chunks(raw: Any, location: str) -> Iterator[bytes]:
    """Read a file in pieces, decompressed; what lies before a break is given out before it raises."""
    if location.endswith((".gz", ".zst")):
        if not raw.read(1):
            raise EOFError("a compressed file of zero bytes")
        raw.seek(0)
    if location.endswith(".gz"):
        with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
            while chunk := stream.read1(COMPRESSED_CHUNK_BYTES):
                yield chunk
    elif location.endswith(".zst"):
        with pa.CompressedInputStream(raw, "zstd") as stream:
            while chunk := stream.read(COMPRESSED_CHUNK_BYTES):
                yield chunk
    else:
        while chunk := raw.read(PLAIN_CHUNK_BYTES):
            yield chunk


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes | Rejected]:
    """Split pieces of a file into lines, never holding more than a piece and one line of bounded length."""
    rest, skipping = b"", False
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if skipping:
                skipping = False  # this is the end of a line that was reported already
            elif len(line) > MAX_ROW_BYTES:
                yield Rejected("TOO_LONG_BYTES", f"{len(line)} bytes")
            elif line.strip():
                yield line
        if len(rest) > MAX_ROW_BYTES:
            if not skipping:
                yield Rejected("TOO_LONG_BYTES", f"over {MAX_ROW_BYTES} bytes")
            rest, skipping = b"", True
    if rest.strip() and not skipping:
        yield rest


def _parse_line(line: bytes | Rejected) -> Any:
    if isinstance(line, Rejected):
        return line
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Rejected("INVALID_UTF8", f"byte {error.start}: {line[:100]!r}")
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
        return Rejected("JSON_SYNTAX", f"{error}: {line[:100]!r}"[:300])
    return row
