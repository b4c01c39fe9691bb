"""Reads rows of CSV and TSV files. The first line names the fields, and all values are text."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected

from .columns import columns_to_read
from .json_rows import MAX_ROW_BYTES, lines, without_bom

RETRY_BYTES = 256 << 20  # per file: how much may be read again after a row of several lines was not valid CSV


def csv_rows(
    chunks: Iterable[bytes], delimiter: str, columns: Columns
) -> Iterator[tuple[dict[str, str] | Rejected, int]]:
    """Yield (row or Rejected, size in bytes) for each row after the header.

    A quoted field may contain line ends. If a quote is never closed, only the line that contains it is rejected, and the
    rows below it are still read.

    Raises:
        Rejected: SHARD_EMPTY, SHARD_DUPLICATE_COLUMN, SHARD_DAMAGED if the header holds zero bytes, or SHARD_UNREADABLE if
            the header cannot be read.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # the default limits fields; here rows are limited
    rows = _rows(chunks, delimiter)
    header, _ = next(rows, (None, 0))
    if header is None:
        raise Rejected("SHARD_EMPTY", "there is no header")
    if isinstance(header, Rejected) and header.reason.startswith("SHARD_"):
        raise header  # the file itself cannot be read, not only its header
    if isinstance(header, Rejected):
        raise Rejected("SHARD_UNREADABLE", f"the header cannot be read: {header.reason}: {header.detail}")
    if any("\0" in name for name in header):
        raise Rejected("SHARD_DAMAGED", f"the header holds zero bytes: {','.join(header)[:100]!r}")
    columns_to_read(header, columns)
    for fields, size in rows:
        if isinstance(fields, Rejected):
            yield fields, size
        elif len(fields) != len(header):
            yield (
                Rejected(
                    "CSV_FIELDS",
                    f"the row has {len(fields)} fields, and the header has {len(header)}: {fields!r}"[:300],
                ),
                size,
            )
        else:
            yield dict(zip(header, fields, strict=True)), size


def _rows(chunks: Iterable[bytes], delimiter: str) -> Iterator[tuple[list[str] | Rejected, int]]:
    source = _Lines(chunks)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        source.begin_row()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except Rejected as rejected:  # raised by `source`, while a line was read
            source.give_back()
            yield rejected, source.size
            continue
        except csv.Error as error:
            source.give_back()
            yield Rejected("CSV_SYNTAX", f"{error}: {source.taken[0][:100]!r}"), source.size
            continue
        if not fields:
            continue  # an empty line
        try:
            "".join(fields).encode()
        except UnicodeEncodeError:
            yield Rejected("INVALID_UTF8", repr(fields)[:300]), source.size
        else:
            yield fields, source.size


class _Lines:
    """An iterator of lines for csv.reader. It keeps the lines of the current row, so that they can be read again."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._lines = lines(chunks, keep_empty=True)
        self._again: deque[str] = deque()
        self._is_first = True
        self._retry_bytes = RETRY_BYTES
        self.taken: list[str] = []
        self.size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._decoded()
        self.taken.append(line)
        self.size += len(line)
        if self.size > MAX_ROW_BYTES:
            raise Rejected("TOO_LONG_BYTES", f"the row has over {MAX_ROW_BYTES} characters: {self.taken[0][:100]!r}")
        return line

    def _decoded(self) -> str:
        line, _ = next(self._lines)
        if isinstance(line, Rejected):
            raise line
        if self._is_first:
            line, self._is_first = without_bom(line), False
        return line.decode("utf-8", "surrogateescape") + "\n"

    def begin_row(self) -> None:
        """Discard the lines of the previous row."""
        self.taken, self.size = [], 0

    def give_back(self) -> None:
        """Put the lines of this row, except the first, back into the input, so that they are read again.

        At most RETRY_BYTES of a file are read again. Do nothing if this row would exceed that limit.
        """
        if self._retry_bytes >= self.size:
            self._retry_bytes -= self.size
            self._again.extendleft(reversed(self.taken[1:]))
