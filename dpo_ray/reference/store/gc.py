"""Clean-up of a reference store.

Damaged segments (files) and unfinished files are deleted, and small segments are merged. Unused partitions (each is
the directory of one model and its numerics) are deleted on request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.names import TEMPORARY_PREFIX
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError

from .care import check_segments, contradictions, last_used_unix_seconds, partitions, read_about
from .segment import key_column, new_name, stamp_nanoseconds, to_bytes
from .store import ABOUT, MARK_SECONDS, USED, StoreIndex, list_partition, read_places, vanished

IN_USE_SECONDS = 3600 + MARK_SECONDS
"""A partition counts as in use if its mark (the time of last use) is younger than this: one hour, plus the largest
delay of a mark."""
MERGED_BYTES = 64 << 20
"""Maximum size of a merged segment: large enough that there are few files, small enough to hold one in memory."""
SMALL_BYTES = MERGED_BYTES // 2
DEAD_SECONDS = 3600  # if a file stays unfinished for this time, its writer has died


@dataclass(frozen=True)
class Cleared:
    """One action of the clean-up on the files of a partition. With `dry_run`, the action was only planned."""

    partition: str
    action: Literal["left alone", "deleted", "merged"]
    files: int
    bytes: int
    why: str


@dataclass(frozen=True)
class _Merge:
    """A plan to merge some segments into one."""

    segments: Sequence[int]  # positions among the valid segments
    entries: np.ndarray  # int64 [n], the entries to keep, as positions in the index; ordered by segment and row
    left_out: int  # number of sequences that are left out because their log-probs contradict each other


def clear(
    root: Storage, *, unused_days: float | None = None, force: bool = False, dry_run: bool = False
) -> list[Cleared]:
    """Clean up all partitions of a store, and return what was done.

    Valid data is never lost, even on interruption: a replacement is committed before the segments that it replaces are
    deleted. A partition that was used in the last hour is left alone.

    Args:
        unused_days: delete partitions that no run has used for this number of days. None: keep them.
        force: also clean up partitions that are in use. A run that is reading such a partition, and does not find a
            segment any more, lists the segments again.
        dry_run: change nothing, and return what would be done.

    Raises:
        LeaseError: another process is cleaning up this store, or has begun to do so while this process was suspended.
    """
    names = partitions(root)
    # Two such processes could destroy data: one could delete a segment into which the other has just merged entries.
    cleared: list[Cleared] = []
    with contextlib.nullcontext() if dry_run or not names else Lease(root.child("gc")) as lease:
        for name in names:
            if lease is not None:
                lease.check()
            cleared += _clear(root.child(name), name, unused_days, force, dry_run)
    return cleared


def _clear(partition: Storage, name: str, unused_days: float | None, force: bool, dry_run: bool) -> Iterator[Cleared]:
    idle_seconds = time.time() - (last_used_unix_seconds(partition) or 0.0)
    if idle_seconds < IN_USE_SECONDS and not force:
        yield Cleared(name, "left alone", 0, 0, "used in the last hour: a run may be writing to it")
        return
    if unused_days is not None and idle_seconds > unused_days * 86400:
        segments = list_partition(partition)[0]
        yield _drop(partition, name, segments, f"not used for {idle_seconds / 86400:,.0f} days", dry_run)
        return
    keys, damaged = check_segments(partition)
    if not keys:
        yield _drop(partition, name, list(damaged), "it contains no valid segment", dry_run)
        return
    yield from _deleted(partition, name, list(damaged), "damaged", dry_run)
    yield from _deleted(partition, name, _damaged_about(partition), "damaged", dry_run)
    yield from _delete_unfinished(partition, name, dry_run)
    yield from _merge(partition, name, keys, dry_run)


def _merge(partition: Storage, name: str, keys: dict[str, np.ndarray], dry_run: bool) -> Iterator[Cleared]:
    names, bytes_of = list(keys), partition.file_sizes()
    sizes = [bytes_of.get(segment, 0) for segment in names]
    index = StoreIndex.of(names, list(keys.values()))
    needless, merges = _plan(partition, index, keys, sizes)
    yield from _deleted(partition, name, [names[s] for s in needless], "all entries are in other segments", dry_run)
    for merge in merges:
        if not dry_run:
            _write_merged(partition, index, merge)
        merged = [names[s] for s in merge.segments]
        if not dry_run:
            for segment in merged:
                partition.delete(segment)
        action, why = ("merged", "into one") if len(merge.entries) else ("deleted", "all entries were scored twice")
        if merge.left_out:
            why += f", without {merge.left_out:,} sequences whose log-probs contradict each other"
        yield Cleared(name, action, len(merged), sum(sizes[s] for s in merge.segments), why)


def _plan(
    partition: Storage, index: StoreIndex, keys: dict[str, np.ndarray], sizes: Sequence[int]
) -> tuple[list[int], list[_Merge]]:
    """Choose the segments to delete, whose entries are all in other segments, and the segments to merge.

    Returns:
        The positions of the segments to delete, and the merges.
    """
    conflicts = contradictions(partition, keys)
    kept = np.ones(len(index), bool)
    kept[index.positions(conflicts.keys)] = False
    tainted = {*conflicts.segment.tolist(), *conflicts.against.tolist()}  # rewritten, whatever their size
    needed = np.bincount(index.segment[kept], minlength=len(sizes))
    needless = [s for s in range(len(sizes)) if not needed[s] and s not in tainted]
    small = [s for s in range(len(sizes)) if s in tainted or (needed[s] and sizes[s] < SMALL_BYTES)]
    order = np.lexsort((index.row, index.segment))  # the order of scoring, so that related entries stay close together
    order = order[kept[order]]
    merges = []
    for batch in _batches(small, sizes):
        if len(batch) > 1 or batch[0] in tainted:
            entries = order[np.isin(index.segment[order], batch)]
            left_out = int(np.isin(index.segment[~kept], batch).sum())
            merges.append(_Merge(batch, entries, left_out))
    return needless, merges


def _batches(segments: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Divide a list of segments into batches of at most MERGED_BYTES. The order does not change."""
    batch, total = [], 0
    for segment in segments:
        if batch and total + sizes[segment] > MERGED_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(segment)
        total += sizes[segment]
    if batch:
        yield batch


def _write_merged(partition: Storage, index: StoreIndex, merge: _Merge) -> None:
    at = merge.entries
    if not len(at):
        return
    try:
        values = read_places(partition, index.segments, index.segment[at], index.row[at])
    except FileNotFoundError as error:
        raise vanished(partition) from error
    # The merged segment gets the time of the oldest segment in it, so that for each key the entry that counted before the
    # merge still counts, also if a segment that is not merged holds the key, too.
    stamp = min(stamp_nanoseconds(index.segments[s]) or 0 for s in merge.segments)
    partition.write(new_name(stamp), to_bytes(key_column(index.keys_at(at)), values), rows=len(at))


def _drop(partition: Storage, name: str, segments: Sequence[str], why: str, dry_run: bool) -> Cleared:
    """Delete all `segments` of a partition. Then delete the partition, unless there are other or new files in it."""
    bytes_of = partition.file_sizes()
    if not dry_run:
        for file in segments:
            partition.delete(file)
        list(_delete_unfinished(partition, name, dry_run))
        if not list_partition(partition)[0] and not any(_unfinished(partition)):  # else a run is just writing to it
            partition.delete(ABOUT)
            partition.delete(USED)
            partition.delete_empty_dir()
    return Cleared(name, "deleted", len(segments), sum(bytes_of.get(s, 0) for s in segments), f"all: {why}")


def _deleted(partition: Storage, name: str, files: Sequence[str], why: str, dry_run: bool) -> Iterator[Cleared]:
    bytes_of = partition.file_sizes()
    if not dry_run:
        for file in files:
            partition.delete(file)
    if files:
        yield Cleared(name, "deleted", len(files), sum(bytes_of.get(file, 0) for file in files), why)


def _damaged_about(partition: Storage) -> list[str]:
    try:
        read_about(partition)
    except ArtifactError:
        return [ABOUT]
    return []


def _delete_unfinished(partition: Storage, name: str, dry_run: bool) -> Iterator[Cleared]:
    """Delete files that writers left unfinished when they died. On an object store there are no such files."""
    leftovers: dict[Path, int] = {}
    for path in _unfinished(partition):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished it
            status = path.stat()
            if time.time() - status.st_mtime > DEAD_SECONDS:
                leftovers[path] = status.st_size
    if not dry_run:
        for path in leftovers:
            path.unlink(missing_ok=True)
    if leftovers:
        yield Cleared(name, "deleted", len(leftovers), sum(leftovers.values()), "left by writers that died")


def _unfinished(partition: Storage) -> Iterator[Path]:
    return partition.local_path().glob(f"{TEMPORARY_PREFIX}*") if partition.is_local else iter(())
