"""Reads a text shard (a JSON or CSV file) as chunks of decompressed bytes. If the file is damaged, the error names the cause."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from dpo_ray.data.admission import Rejected

PLAIN_CHUNK_BYTES = 1 << 20
COMPRESSED_CHUNK_BYTES = 64 << 10  # read at once; if a file ends early, at most so many bytes before its end are lost
_ZSTD_SKIPPABLE = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))  # RFC 8878, 3.1.2
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}


def text_chunks(raw: Any, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the decompressed bytes of an open file. If it is damaged, yield the bytes before the damage, and then raise.

    From an uncompressed file, only the lines are read whose first byte is in [start, stop). A compressed file is read
    completely.

    Raises:
        Rejected: SHARD_EMPTY, SHARD_COMPRESSION, SHARD_ENCODING, SHARD_TRUNCATED or SHARD_DAMAGED.
        OSError: the file cannot be read.
    """
    head = raw.peek(8)[:8]
    compression = {".gz": "gzip", ".zst": "zstd"}.get(name[name.rfind(".") :].lower())
    if compression and not head:
        raise Rejected("SHARD_EMPTY", f"the {compression} file has zero bytes")
    actual = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    actual = "zstd" if head.startswith(_ZSTD_SKIPPABLE) else actual
    if actual != compression:
        raise Rejected(
            "SHARD_COMPRESSION",
            f"{actual or 'no known compression'} was found in the file {name}, which begins with {head!r}",
        )
    match compression:
        case "gzip":
            chunks = _gunzipped(raw)
        case "zstd":
            chunks = _unzstd(raw)
        case _:
            chunks = _plain(raw, start, stop)
    for number, chunk in enumerate(chunks):
        if number == 0 and start == 0:
            _check_encoding(chunk)
        yield chunk


def _check_encoding(head: bytes) -> None:
    """Check that a text is not UTF-16 or UTF-32, in which nearly every second byte of most texts is zero.

    If all bytes are zero, the file is damaged (such as by an unwritten block). Then only the damaged rows are rejected later.
    """
    sample = head[:64]
    zeros, zeros_between = sample[0::2].count(0), sample[1::2].count(0)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or (
        len(sample) >= 8 and abs(zeros - zeros_between) > len(sample) / 5
    ):
        raise Rejected("SHARD_ENCODING", f"the file begins with {sample[:16]!r}")


def _gunzipped(raw: Any) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
            while chunk := stream.read1(COMPRESSED_CHUNK_BYTES):
                yield chunk
    except EOFError as error:
        raise Rejected("SHARD_TRUNCATED", str(error)) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Rejected("SHARD_DAMAGED", str(error)) from error


def _unzstd(raw: Any) -> Iterator[bytes]:
    try:
        with pa.CompressedInputStream(raw, "zstd") as stream:
            while chunk := stream.read(COMPRESSED_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        if error.errno is not None:  # the file's own failure, not the decompressor's
            raise
        reason = "SHARD_TRUNCATED" if "Truncated" in str(error) else "SHARD_DAMAGED"
        raise Rejected(reason, str(error)) from error


def _plain(raw: Any, start: int, stop: int | None) -> Iterator[bytes]:
    """Yield the whole lines whose first byte is in [start, stop)."""
    begun = start == 0
    after = max(start - 1, 0)  # the byte before `start` shows whether a line begins there
    if after:
        raw.seek(after)
    while chunk := raw.read(PLAIN_CHUNK_BYTES):
        at, after = after, after + len(chunk)
        if not begun:
            first = chunk.find(b"\n") + 1
            begun = first > 0
            if stop is not None and (at + first if begun else after) >= stop:
                return  # the line that contains `start` ends behind `stop`
            if not begun:
                continue
            chunk, at = chunk[first:], at + first
        if stop is not None and after >= stop:
            last = chunk.find(b"\n", max(stop - 1 - at, 0))
            if last >= 0:
                yield chunk[: last + 1]
                return
        yield chunk
