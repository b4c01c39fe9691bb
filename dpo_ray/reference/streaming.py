"""Scoring in the order of training (`reference.mode: streaming`). Training starts before all groups are scored.

The schedule's steps are divided into buckets (ranges of steps). The files of a bucket are written as soon as its groups
are scored. A turn is the groups of one bucket, or groups that no step uses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from math import ceil
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray

from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.staging import Staging
from dpo_ray.reference.store.store import ReferenceStore, StoreIndex
from dpo_ray.schedule.buckets import Bucket, read_rows
from dpo_ray.schedule.build import Packing, write_bucket
from dpo_ray.schedule.streaming_order import Turn

from .granule import Scored, Unscored
from .join import fetch_token_logps
from .lookup import cut, find_missing

Item = TypeVar("Item")
RunPool = Callable[[Iterable[ray.ObjectRef]], Iterator[Scored]]


class Stopped(Exception):
    """Raised when scoring stops early because training has ended with an error, so nobody needs the log-probs."""


class UnscorableError(Exception):
    """Raised if some groups cannot be scored. These groups must be left out, which changes the groups of all steps.

    So the steps that training has already made cannot be used.
    """

    def __init__(self, unscored: Sequence[Unscored]) -> None:
        super().__init__(f"{len(unscored)} groups cannot be scored ({unscored[0].reason}: {unscored[0].detail})")
        self.unscored = tuple(unscored)


class InOrder:
    """Scores turns in order. A turn is the groups of one bucket of steps, or groups that no step uses.

    The files of a turn are written when this turn and all turns before it are scored.
    The Ray tasks of this class request no CPU. Training waits for them, so they must never wait for a CPU that training
    holds.

    Args:
        granule_groups: maximum number of groups in a granule (a batch for an engine). Granules are smaller if a turn
            has too few groups for all `engines`.
        announce: called, in another thread, with the files of a turn when they are written.
        on_lookup: called for each turn with the number of completions that the store had, and the number of groups
            whose completions were all in the store.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        store: ReferenceStore,
        granule_groups: int,
        engines: int,
        packing: Packing,
        staging: Staging,
        announce: Callable[[Sequence[FileEntry]], None],
        on_lookup: Callable[[int, int], None],
    ) -> None:
        self._turns, self._store, self._granule_groups, self._engines = turns, store, granule_groups, engines
        self._packing, self._staging, self._announce, self._on_lookup = packing, staging, announce, on_lookup
        self._index = ray.remote(num_cpus=0)(_index).remote(store)  # of the log-probs that existed before this run
        self._turn_of: list[int] = []  # for each granule given to the pool, the number of its turn
        self._groups_left = [0] * len(turns)  # for each turn, groups given to the pool and not scored yet
        self._handed_out = 0  # number of turns whose groups have all been given to the pool
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="schedule-writer")
        self._writes: list[Future[list[FileEntry]]] = []  # one for each turn so far, in order

    def run(self, run_pool: RunPool, stop: threading.Event) -> Iterator[Scored]:
        """Score and write all turns; yield the result of each granule.

        Args:
            run_pool: the method `EnginePool.run`.
            stop: when this is set, scoring ends at the next granule.

        Raises:
            UnscorableError: the pool could not score a group.
            Stopped: `stop` was set.
            EngineError, InfrastructureError, ArtifactError: raised by the pool or the store.
        """
        try:
            answers = run_pool(self._granules(stop))
            with closing(answers):  # pyright: ignore[reportArgumentType] - it is a generator
                for scored in answers:
                    if scored.unscored:
                        raise UnscorableError(scored.unscored)
                    self._groups_left[self._turn_of[scored.granule]] -= scored.groups
                    self._write_scored()
                    yield scored
                    self._raise_failed(stop)
            wait(self._writes)
            self._raise_failed(stop)
        finally:
            self._writer.shutdown(cancel_futures=True)

    def entries(self) -> list[FileEntry]:
        """Return the manifest entries of the files of all turns. Call this after `run` has ended."""
        return [entry for write in self._writes for entry in write.result()]

    def _granules(self, stop: threading.Event) -> Iterator[ray.ObjectRef]:
        """Yield the granules of all turns in order. The next turn is already looked up while this turn is scored."""
        for number, answers in enumerate(_one_ahead(self._look_ups())):
            if answers is not None:
                found, known_groups, sizes = ray.get(next(answers))
                self._on_lookup(found, known_groups)
                for groups in sizes:
                    if stop.is_set():
                        return
                    self._turn_of.append(number)
                    self._groups_left[number] += groups
                    yield next(answers)
            self._handed_out = number + 1
            self._write_scored()

    def _write_scored(self) -> None:
        """Start writing the turns that are scored, in order.

        The order matters, because a group that occurs in two turns is scored with the earlier turn.
        """
        while (number := len(self._writes)) < self._handed_out and not self._groups_left[number]:
            self._writes.append(self._writer.submit(self._write, self._turns[number]))

    def _raise_failed(self, stop: threading.Event) -> None:
        for write in self._writes:
            if write.done() and (error := write.exception()) is not None:
                raise error
        if stop.is_set():
            raise Stopped

    def _look_ups(self) -> Iterator[Any]:
        """Start, for each turn, a Ray task that looks up the groups that no earlier turn contains; yield its results.

        Yield None for a turn whose groups are all in earlier turns.
        """
        look_up = ray.remote(num_cpus=0, num_returns="streaming")(_look_up)
        seen: dict[str, np.ndarray] = {}  # by split: bool [rows]
        for turn in self._turns:
            split, rows = turn.bucket.split, turn.bucket.rows
            known = seen.get(split, np.zeros(0, bool))
            known = np.pad(known, (0, max(0, int(rows[-1]) + 1 - len(known))))
            new, known[rows], seen[split] = ~known[rows], True, known
            if not new.any():
                yield None
                continue
            table = read_rows(turn.file).select(["group_id", "prompt_ids", "completion_ids"]).filter(pa.array(new))
            yield look_up.remote(table, self._store, self._index, self._granule_groups, self._engines)

    def _write(self, turn: Turn) -> list[FileEntry]:
        if not turn.is_scheduled:
            return []
        write = ray.remote(num_cpus=0)(_join_and_write)
        table = read_rows(turn.file)
        entries = ray.get(write.remote(turn.bucket, table, self._store, self._index, self._packing, self._staging))
        turn.file.unlink()
        self._announce(entries)
        return entries


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield all items. Before each item is yielded, the next item is already taken from `items`."""
    buffer: list[Item] = []
    for item in items:
        buffer.append(item)
        if len(buffer) == 2:
            yield buffer.pop(0)
    yield from buffer


# ---- in Ray's workers


def _index(store: ReferenceStore) -> StoreIndex:
    return store.index()


def _look_up(
    table: pa.Table, store: ReferenceStore, index: StoreIndex, granule_groups: int, engines: int
) -> Iterator[tuple[int, int, list[int]] | pa.Table]:
    """Look up one turn's groups; yield a tuple of counts, then the granules of the missing completions.

    The counts are: the number of completions in the store, the number of groups whose completions are all in the store,
    and a list of the granules' sizes.
    """
    missing, found = find_missing(table, store, index)
    size = min(granule_groups, max(1, ceil(len(missing) / engines)))
    granules = list(cut([missing], size))
    yield found, len(table) - len(missing), [len(granule) for granule in granules]
    for granule in granules:  # noqa: UP028 - Ray drives this generator with `send`, which a list's iterator lacks
        yield granule


def _join_and_write(
    bucket: Bucket, table: pa.Table, store: ReferenceStore, index: StoreIndex, packing: Packing, staging: Staging
) -> list[FileEntry]:
    """Fetch the log-probs of a bucket's groups from the store, pack the groups into micro-batches, and write these."""
    table = table.append_column("token_logps", fetch_token_logps(table, store, store.index(known=index)))
    return write_bucket(bucket, table, packing, staging)
