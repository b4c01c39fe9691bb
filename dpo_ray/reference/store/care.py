"""Inspection of a reference store: functions that count its contents, and check whether the contents are valid.

A partition is the directory of the store for one model and its numerics (engine, version, device, dtypes).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError

from .segment import read_size, read_whole, stamp_nanoseconds
from .store import (
    ABOUT,
    KEY,
    READ_THREADS,
    StoreIndex,
    list_partition,
    marked_unix_seconds,
    partition_name,
    read_places,
    vanished,
)

READERS = 4  # maximum number of complete segments (files) in memory at once
COMPARED_AT_ONCE = 16_384  # number of repeated entries that are compared at once
AGREEMENT = {"float32": 1e-4}
ROUGH_AGREEMENT = 0.5
"""Largest allowed difference (nats) between two computations of the same log-prob: AGREEMENT in float32, this value in
other dtypes."""
_PARTITION = re.compile(r"[0-9a-f]{16}-[0-9a-f]{12}")


@dataclass(frozen=True)
class PartitionStats:
    """The contents of one partition of the store, read from the footers of its files."""

    partition: str
    model_digest: str  # "" if about.json is missing or damaged
    numerics: dict[str, Any]  # {} if about.json is missing or damaged
    segments: int
    sequences: int  # a sequence that occurs in two segments counts twice
    tokens: int
    bytes: int
    damaged_segments: int  # segments whose footer cannot be read; `verify` reads the files in full
    used_unix_seconds: float | None


@dataclass(frozen=True)
class Fault:
    """A fault in the store: the file, and what is wrong with it."""

    where: str
    what: str


@dataclass(frozen=True)
class Contradictions:
    """Keys that occur twice with different log-probs. One of the two entries is wrong, but which one is unknown."""

    keys: np.ndarray  # KEY [m]
    segment: np.ndarray  # int64 [m], the segment of the later entry: its position among the compared segments
    against: np.ndarray  # int64 [m], the segment of the first entry of the same key


def partitions(root: Storage) -> list[str]:
    """List the names of a store's partitions; other directories are ignored."""
    return [name for name in root.list_dirs() if _PARTITION.fullmatch(name)]


def stats(root: Storage) -> list[PartitionStats]:
    """Return the contents of each partition of a store. Only the footers of the files are read, no log-probs."""
    return [_stats(root.child(name), name) for name in partitions(root)]


def verify(root: Storage) -> Iterator[Fault]:
    """Read a complete store and yield all faults: damaged files, invalid log-probs, and contradicting entries."""
    for name in partitions(root):
        partition = root.child(name)
        try:
            about = read_about(partition)
            if about and partition_name(about["model_digest"], about["numerics"]) != name:
                yield Fault(partition.full_path(ABOUT), "the file describes another partition")
        except ArtifactError as error:
            yield Fault(error.where, error.what)
        keys, damaged = check_segments(partition)
        yield from (Fault(error.where, error.what) for error in damaged.values())
        names, conflicts = list(keys), contradictions(partition, keys)
        pairs = Counter(zip(conflicts.segment.tolist(), conflicts.against.tolist(), strict=True))
        for (segment, against), count in sorted(pairs.items()):
            what = f"{count:,} sequences of this file have other log-probs in {names[against]}"
            yield Fault(partition.full_path(names[segment]), what)


def read_about(partition: Storage) -> dict[str, Any]:
    """Read the description (about.json) of a partition: its model and numerics. Return {} if the file is missing.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        about = json.loads(partition.read_bytes(ABOUT))
        if not (isinstance(about["model_digest"], str) and isinstance(about["numerics"], dict)):
            raise ValueError("the fields have the wrong types")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"the description of a partition of the reference store is damaged: {error}",
            where=partition.full_path(ABOUT),
            fix="delete that file; the next run that scores will write it again",
        ) from error
    return about


def last_used_unix_seconds(partition: Storage) -> float | None:
    """Return the Unix time when a partition was last used, accurate to one hour. Return None if it is unknown."""
    stamps = [stamp_nanoseconds(name) or 0 for name in list_partition(partition)[0]]
    known = [marked_unix_seconds(partition) or 0.0, max(stamps, default=0) / 1e9]
    return max(known) or None


def check_segments(partition: Storage) -> tuple[dict[str, np.ndarray], dict[str, ArtifactError]]:
    """Read and check all segments (files) of a partition.

    Returns:
        The keys (KEY [n]) of each valid segment, by its name; and the error of each damaged segment, by its name.
    """

    def keys_or_error(name: str) -> np.ndarray | ArtifactError | None:
        try:
            return read_whole(partition, name)[0]
        except ArtifactError as error:
            return error
        except FileNotFoundError:  # deleted since the listing
            return None

    names, _ = list_partition(partition)
    with ThreadPoolExecutor(READERS) as pool:
        checked = list(zip(names, pool.map(keys_or_error, names), strict=True))
    keys = {name: result for name, result in checked if isinstance(result, np.ndarray)}
    return keys, {name: result for name, result in checked if isinstance(result, ArtifactError)}


def contradictions(partition: Storage, keys: Mapping[str, np.ndarray]) -> Contradictions:
    """Find keys that occur several times with different log-probs. Each entry is compared with the key's first entry.

    Args:
        keys: the keys of each segment, by the segment's name.
    """
    names, columns = list(keys), list(keys.values())
    tolerance = _tolerance(partition)
    index = StoreIndex.of(names, columns)
    every = np.concatenate([np.empty(0, KEY), *columns])
    segment = np.repeat(np.arange(len(names)), [len(column) for column in columns])
    row = np.concatenate([np.empty(0, np.int64), *(np.arange(len(column)) for column in columns)])
    first = index.positions(every)
    again = np.flatnonzero((index.segment[first] != segment) | (index.row[first] != row))
    differ = [np.empty(0, np.int64)]
    for begin in range(0, len(again), COMPARED_AT_ONCE):
        at = again[begin : begin + COMPARED_AT_ONCE]
        try:
            here = read_places(partition, names, segment[at], row[at])
            there = read_places(partition, names, index.segment[first[at]], index.row[first[at]])
        except FileNotFoundError as error:
            raise vanished(partition) from error
        differ.append(at[differing(here, there, tolerance)])
    at = np.concatenate(differ)
    return Contradictions(every[at], segment[at], index.segment[first[at]].astype(np.int64))


def differing(some: pa.ListArray, others: pa.ListArray, tolerance: float) -> np.ndarray:
    """Compare two columns of lists row by row. Return bool [n]: True if the two lists of a row differ.

    Lists differ if their lengths differ, or if two values differ by more than `tolerance`.
    """
    lengths = np.diff(some.offsets.to_numpy())
    differ = lengths != np.diff(others.offsets.to_numpy())
    alike = np.flatnonzero(~differ)
    values, other_values = (lists.take(pa.array(alike)).flatten().to_numpy() for lists in (some, others))
    owner = np.repeat(alike, lengths[alike])
    differ[owner[np.abs(values - other_values) > tolerance]] = True
    return differ


def _tolerance(partition: Storage) -> float:
    try:
        return AGREEMENT.get(read_about(partition).get("numerics", {}).get("dtype", ""), ROUGH_AGREEMENT)
    except ArtifactError:
        return ROUGH_AGREEMENT


def _stats(partition: Storage, name: str) -> PartitionStats:
    def size_or_none(segment: str) -> tuple[int, int] | None:
        try:
            return read_size(partition, segment)
        except (ArtifactError, FileNotFoundError):
            return None

    try:
        about = read_about(partition)
    except ArtifactError:
        about = {}
    names, _ = list_partition(partition)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        sizes = [size for size in pool.map(size_or_none, names) if size is not None]
    bytes_of = partition.file_sizes()
    return PartitionStats(
        partition=name,
        model_digest=about.get("model_digest", ""),
        numerics=about.get("numerics", {}),
        segments=len(names),
        sequences=sum(rows for rows, _ in sizes),
        tokens=sum(tokens for _, tokens in sizes),
        bytes=sum(bytes_of.get(segment, 0) for segment in names),
        damaged_segments=len(names) - len(sizes),
        used_unix_seconds=last_used_unix_seconds(partition),
    )
