"""A schedule that training workers read while it is still being written. They wait for each file until it is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import WorkersLostError

from .files import parse_file_name

ASK_SECONDS = 5.0  # how long one request waits for its answer; then the worker reports that it waits and asks again
MOST_WAITING = 10_000  # ranks that may wait concurrently
MOVE_SECONDS = 60.0  # how long to look for a file that a commit has moved to another place


class Feed:
    """A Ray actor that records which files of the schedule are ready, and where they are.

    The feed runs on the driver's node, so it is lost only if the run is lost as well. If scoring fails, all ranks stop
    at the same bucket (range of steps). A bucket stays available to all ranks if at least one rank has already received
    its file of this bucket. All other buckets become unavailable.
    """

    def __init__(self, staging: Storage) -> None:
        """Create the feed without ready files. All files will be written to `staging`."""
        self._place: Storage | Artifact = staging
        self._ready: set[str] = set()
        self._given: set[tuple[str, int]] = set()  # (split, first step) of the buckets that a rank has begun to read
        self._failure = ""
        self._changed = asyncio.Condition()

    async def announce(self, names: Sequence[str]) -> None:
        """Mark written files as ready. The files of a bucket must be announced for all ranks in one call."""
        async with self._changed:
            self._ready.update(names)
            self._changed.notify_all()

    async def move(self, artifact: Artifact) -> None:
        """Record that all files were committed, and are now in `artifact`."""
        async with self._changed:
            self._place = artifact
            self._changed.notify_all()

    async def fail(self, reason: str) -> None:
        """Record that scoring has failed. Training then ends after the bucket that it is reading."""
        async with self._changed:
            self._failure = reason
            self._ready = {name for name in self._ready if _bucket(name) in self._given}
            self._changed.notify_all()

    async def locate(self, name: str, wait_seconds: float) -> Storage | Artifact | WorkersLostError | None:
        """Wait at most `wait_seconds` for a file, and return where it is; return None if it is not ready by then.

        If scoring has failed and the file is not available, return a WorkersLostError for the caller to raise.
        """
        async with self._changed:
            if name not in self._ready and not self._failure:
                try:
                    waiting = self._changed.wait_for(lambda: name in self._ready or self._failure)
                    await asyncio.wait_for(waiting, wait_seconds)
                except TimeoutError:
                    return None
            if name in self._ready:
                self._given.add(_bucket(name))
                return self._place
            return WorkersLostError(
                f"scoring has failed, so the next steps are not available: {self._failure}", where="reference"
            )


def _bucket(name: str) -> tuple[str, int]:
    split, _, first_step = parse_file_name(name)
    return split, first_step


@dataclass(frozen=True)
class LiveSchedule:
    """A `Schedule` whose files are still being written: the driver announces files, and workers read them. It can be pickled."""

    rows: Mapping[str, int]
    feed: Any  # handle of the Feed
    inbox: Any  # handle of the driver's inbox, to which rank 0 reports what it waits for

    @classmethod
    def start(cls, rows: Mapping[str, int], staging: Storage, inbox: Any) -> LiveSchedule:
        """Start the feed as an actor on the driver's node. The actor ends when the driver ends."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": MOST_WAITING}
        return cls(rows, ray.remote(Feed).options(**options).remote(staging), inbox)

    def announce(self, names: Sequence[str]) -> None:
        """Announce that the files of a bucket (range of steps) were written for all ranks. The driver calls this."""
        ray.get(self.feed.announce.remote(names))

    def move(self, artifact: Artifact) -> None:
        """Announce that all files were committed. The driver calls this."""
        ray.get(self.feed.move.remote(artifact))

    def fail(self, reason: str) -> None:
        """Announce that scoring has failed, so that no further file will be written. The driver calls this."""
        ray.get(self.feed.fail.remote(reason))

    def open(self, name: str) -> BinaryIO:
        """Open a file as soon as it is ready.

        Raises:
            WorkersLostError: the file will never be written, because scoring has failed. All ranks get this error at the same
                bucket.
            ArtifactError: the file was written, but is lost.
        """
        missed_since = None
        while True:
            place = self._located(name)
            try:
                return place.open(name) if isinstance(place, Artifact) else place.open_input(name)
            except FileNotFoundError:
                missed_since = missed_since or time.monotonic()
                if time.monotonic() - missed_since > MOVE_SECONDS:
                    raise
                time.sleep(0.1)  # a commit has moved the file, and the feed does not know it yet

    def _located(self, name: str) -> Storage | Artifact:
        split, rank, first_step = parse_file_name(name)
        is_reported = rank != 0
        while True:
            place: Any = ray.get(self.feed.locate.remote(name, ASK_SECONDS))
            if isinstance(place, WorkersLostError):
                raise place
            if place is not None:
                return place
            if not is_reported:
                self.inbox.put.remote({"waiting_for": split, "step": first_step + 1})
                is_reported = True
