"""Sorts the rows (groups) of a split into buckets. A bucket is a range of consecutive steps; it has one file on local disk.

Rows arrive in the order of the input files, but are needed in a shuffled order. All rows together do not fit in memory, so
they pass through memory a few at a time. A process also cannot keep the files of very many buckets open. If there
are too many buckets, each row is first written to an intermediate file for several buckets, which is then split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .files import bucket_ranges, most_bucket_steps

ROW = "row"  # the column with the number of each row, counted through all parts of the split
MOST_OPEN_FILES = 256  # files that are written at the same time; many systems allow a process 1,024
DEALT_BYTES = 64 << 20  # bytes of rows that are distributed at once; more bytes mean fewer and larger writes per file

Steps = Sequence[Sequence[int]]
"""For each step, the row numbers of its groups."""


@dataclass(frozen=True)
class Bucket:
    """A range of consecutive steps of one split. Their micro-batches share one file per rank. It can be pickled."""

    split: str
    first_step: int
    steps: Steps

    @property
    def stop_step(self) -> int:
        return self.first_step + len(self.steps)

    @property
    def rows(self) -> np.ndarray:
        """Return the numbers of all rows in the bucket's steps, in ascending order without duplicates: int64 [rows]."""
        return np.unique(np.concatenate([np.asarray(step, np.int64) for step in self.steps]))


def buckets_of(split: str, steps: Steps) -> list[Bucket]:
    """Divide the steps of a split into buckets, that is, ranges of steps that share a file."""
    ranges = bucket_ranges(len(steps), most_bucket_steps(steps))
    return [Bucket(split, b.start, steps[b.start : b.stop]) for b in ranges]


def deal_rows(parts: Sequence[Callable[[], pa.Table]], buckets: Sequence[Bucket], scratch: Path) -> list[Path]:
    """Write the rows of each bucket, with the column `row`, to a separate file below `scratch`, and return the files.

    `parts` are functions that load the tables of the input files, one by one. Each table is loaded only once.
    """
    files = [scratch / f"{i}.arrow" for i in range(len(buckets))]
    _deal(_numbered(parts), [bucket.rows for bucket in buckets], files)
    return files


def read_rows(file: Path) -> pa.Table:
    """Read the rows that `deal_rows` wrote for one bucket, in the order of `Bucket.rows`."""
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def _numbered(parts: Iterable[Callable[[], pa.Table]]) -> Iterator[pa.Table]:
    offset = 0
    for load in parts:
        table = load()
        yield table.append_column(ROW, pa.array(np.arange(offset, offset + len(table))))
        offset += len(table)


def _deal(tables: Iterable[pa.Table], wanted: Sequence[np.ndarray], files: Sequence[Path]) -> None:
    """Write rows of the tables to files. `wanted` lists the row numbers for each file.

    The row numbers in `wanted`, and the rows in the tables, must be in ascending order.
    """
    if len(files) > MOST_OPEN_FILES:
        _deal_twice(tables, wanted, files)
        return
    rows = np.concatenate([np.zeros(0, np.int64), *wanted])
    owners = np.repeat(np.arange(len(wanted), dtype=np.int32), [len(of_file) for of_file in wanted])
    by_row = np.argsort(rows, kind="stable")
    rows, owners = rows[by_row], owners[by_row]
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    with ExitStack() as stack:
        for batch in _gathered(tables):
            numbers = batch[ROW].to_numpy()
            low, high = np.searchsorted(rows, [numbers[0], numbers[-1] + 1])
            by_owner = low + np.argsort(owners[low:high], kind="stable")  # stable: each file's rows stay ascending
            batch_rows = batch.take(pa.array(np.searchsorted(numbers, rows[by_owner])))
            pieces = np.unique(owners[by_owner], return_index=True, return_counts=True)
            for owner, start, count in zip(*(of_piece.tolist() for of_piece in pieces), strict=True):
                if owner not in writers:
                    sink = stack.enter_context(pa.OSFile(str(files[owner]), "wb"))
                    writers[owner] = stack.enter_context(pa.ipc.new_stream(sink, batch_rows.schema))
                writers[owner].write_batch(batch_rows.slice(start, count))


def _deal_twice(tables: Iterable[pa.Table], wanted: Sequence[np.ndarray], files: Sequence[Path]) -> None:
    """Write rows to more files than a process can keep open, in two passes.

    The first pass writes a few intermediate files, each with the rows of several files. The second pass splits them.
    """
    size = math.ceil(len(files) / MOST_OPEN_FILES)
    runs = [slice(first, first + size) for first in range(0, len(files), size)]
    shared = [files[run][0].with_name(f"{files[run][0].stem}-of-{size}.arrow") for run in runs]
    _deal(tables, [np.unique(np.concatenate(wanted[run])) for run in runs], shared)
    for run, file in zip(runs, shared, strict=True):
        _deal(_tables_of(file), wanted[run], files[run])
        file.unlink()


def _tables_of(file: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Join tables into non-empty batches of about `DEALT_BYTES`."""
    buffer: list[pa.Table] = []
    buffer_bytes = 0
    for table in tables:
        buffer.append(table)
        buffer_bytes += table.nbytes
        if buffer_bytes >= DEALT_BYTES:
            yield from pa.concat_tables(buffer).combine_chunks().to_batches()
            buffer, buffer_bytes = [], 0
    if buffer:
        yield from pa.concat_tables(buffer).combine_chunks().to_batches()
