"""A lease that allows only one driver at a time to write to a run, on disks and object stores alike.

Lease files are numbered: lease-000001.json, lease-000002.json, ... The file with the highest number is the lease. A
driver takes it over by exclusively creating the next number, so exactly one of many contenders wins; the number is the
fencing token. A thread of the holder regularly rewrites the holder's lease file as a heartbeat.

No wall clock decides anything: clocks of machines differ, and may be set at any time. A contender watches whether the
holder's file changes during the lease's whole time to live, measured by the contender's clock. It need not watch in
three cases: the holder has released the lease, the holder was a process of this machine and has ended, or the holder
runs on this machine and has just written its heartbeat.

A holder that is alive is an error, with one exception: a driver that follows another driver of the same job (a RayJob
that starts again) waits, because whoever started it also ends the former one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from dpo_ray.errors import ArtifactError, DpoRayError, LeaseError

from .process import Process, user_name
from .storage import Storage

logger = logging.getLogger(__name__)

MAX_TRIES = 20
MOST_SECONDS = 1e12
LOOKS_PER_TTL = 20  # how often a contender that watches a heartbeat reads it
FOLLOW_SECONDS = 900.0  # how long a driver waits for a living former driver of its job; a pod is killed long before
SAY_SECONDS = 20.0  # between two lines of a driver that waits
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_FILE = re.compile(r"lease-(\d{6,})\.json")


def boot_seconds() -> float:
    """Return the seconds since this machine was started, suspended time included; nobody can set this clock."""
    return time.clock_gettime(_CLOCK)


class Lease:
    """The right to write to a run. Entering the context acquires the lease or raises LeaseError; leaving releases it.

    A lease is free in three cases: it was released, its holder was a process of this machine (or pod) and has ended, or
    its heartbeat did not change for its `ttl_seconds` while a contender watched it.
    """

    def __init__(
        self,
        storage: Storage,
        holder: str = "",
        ttl_seconds: float = 60.0,
        clock: Callable[[], float] = boot_seconds,
        sleep: Callable[[float], object] = time.sleep,
        *,
        job: str = "",
        pod: str = "",
        say: Callable[[str], object] = logger.warning,
    ) -> None:
        """Prepare a lease with files in `storage`.

        Args:
            holder: what other drivers' errors show of this driver; default: user, host, pid.
            job: the job that starts this driver again if it ends; a former driver of the same job is waited for.
            pod: the name of this driver's pod; of two drivers in pods of one name, the former has ended.
            say: called with a line while this driver waits.
        """
        self.storage, self.ttl_seconds = storage, ttl_seconds
        self.token = 0  # grows with every acquisition; 0 before the first
        self.lost = False
        self._holder, self._clock, self._sleep = holder, clock, sleep
        self._job, self._pod, self._say = job, pod, say
        self._record: dict[str, Any] = {}
        self._pid = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Acquire the lease.

        If the holder is on another machine, or does not write its heartbeat, this method waits up to the holder's time
        to live.

        Raises:
            LeaseError: a driver that is still alive holds the lease; the message names this driver.
        """
        for _ in range(MAX_TRIES):
            highest = self._highest()
            if highest:
                self._wait_until_free(highest)
            if self._take(highest + 1):
                self._start()
                return self
        raise LeaseError(
            "other drivers keep taking the lease", where=self.storage.uri, fix="run only one driver of this run"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease and remove older lease files. In a forked child, do nothing: the parent releases it."""
        if os.getpid() != self._pid:
            return
        self._stop.set()
        if self._thread:
            self._thread.join()
        try:
            self._refresh(released=True)
            if not self.lost:
                self._remove_older()
        except (DpoRayError, OSError) as failure:  # the work is done; the lease expires by itself
            logger.warning("the lease could not be released and expires in %g s: %s", self.ttl_seconds, failure)
        self._pid = 0

    def check(self) -> None:
        """Check that this driver still holds the run. Call this before every commit.

        Each call reads the lease from the storage, because a driver that was paused cannot know how long the pause was.

        Raises:
            LeaseError: another driver has taken over the run.
            ArtifactError: the lease file is missing, so the storage is probably gone.
        """
        with self._lock:
            self.lost = self.lost or not self._is_held()
        if self.lost:
            raise self._loss()

    def _loss(self) -> DpoRayError:
        if self._highest() < self.token:
            return ArtifactError(
                f"the run's directory is gone, or was emptied: {_file_name(self.token)}, which this driver wrote, is missing",
                where=self.storage.uri,
                fix="mount or restore the storage, then run the same command again: it continues from what was committed",
            )
        return LeaseError(
            f"this driver lost the run: another driver took over lease {self.token}",
            where=self.storage.uri,
            fix="let the other driver continue; it uses everything that this driver has committed",
        )

    def _wait_until_free(self, number: int) -> None:
        """Wait until the lease may be taken over; raise LeaseError if its holder is alive and will not be ended."""
        record = self._read(number)
        if record is None or is_free(record) or self._ended_in_this_pod(record):
            return
        ttl_seconds, began = _seconds(record, "ttl_seconds"), self._clock()
        is_followed = bool(self._job) and record.get("job") == self._job
        if self._is_fresh(record) and not is_followed:
            raise self._held(number, record)
        whose = "the former driver of this job, " if is_followed else ""
        self._say(f"the run is held by {whose}{record.get('holder')}: watching its heartbeat for {ttl_seconds:g} s")
        silent_since = said = began
        while True:
            now = self._clock()  # before the look: the last look comes after the whole time
            found = self._read(number)
            if found is None or is_free(found):
                return
            if found != record:
                if not is_followed or now - began >= FOLLOW_SECONDS:
                    raise self._held(number, found)
                record, silent_since = found, self._clock()
            elif now - silent_since >= ttl_seconds:
                return
            if now - said >= SAY_SECONDS:
                said = now
                self._say(
                    f"waiting for {record.get('holder')}: its heartbeat has been silent for {now - silent_since:.0f} s, "
                    f"and after {ttl_seconds:g} s the run is free"
                )
            self._sleep(ttl_seconds / LOOKS_PER_TTL)

    def _ended_in_this_pod(self, record: dict[str, Any]) -> bool:
        """Return whether the holder ran in an earlier container of this driver's pod, or in a pod that this one replaces.

        A pod has one name for all its containers in turn, and a name is given again only when its pod is gone.
        """
        process = Process.from_json(record.get("process"))
        is_here = bool(self._pod) and record.get("pod") == self._pod
        return is_here and process is not None and process.boot != Process.current().boot

    def _is_fresh(self, record: dict[str, Any]) -> bool:
        """Return whether the holder runs on this machine, and wrote its heartbeat within its time to live."""
        process = Process.from_json(record.get("process"))
        if process is None or not process.is_alive_here():
            return False
        return 0 <= self._clock() - _seconds(record, "heartbeat_boot_seconds") <= _seconds(record, "ttl_seconds")

    def _is_held(self) -> bool:
        """Return whether this lease has the highest number; return False if its file was deleted by hand."""
        if self._highest() != self.token:
            return False
        record = self._read(self.token)
        return record is not None and record.get("nonce") == self._record["nonce"]

    def _take(self, number: int) -> bool:
        process, since = Process.current(), datetime.now(UTC).isoformat(timespec="seconds")
        self._record = {
            "holder": self._holder or f"{user_name()}@{process.host} pid {process.pid} since {since}",
            "process": dataclasses.asdict(process),
            "job": self._job,
            "pod": self._pod,
            "nonce": secrets.token_hex(8),
            "ttl_seconds": self.ttl_seconds,
            "heartbeats": 0,
            "heartbeat_boot_seconds": self._clock(),  # of the holder's machine: means nothing on another
            "released": False,
        }
        try:
            self.storage.create(_file_name(number), _encode(self._record))
        except FileExistsError:
            record = self._read(number)  # our own if a request was retried after its response was lost
            if record is None or record.get("nonce") != self._record["nonce"]:
                return False
        if self._highest() > number:  # too late: the number had already been used, released and removed
            self.storage.delete(_file_name(number))
            return False
        self.token, self.lost, self._pid = number, False, process.pid
        return True

    def _start(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease-heartbeat", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._stop.wait(self.ttl_seconds / 3) and not self.lost:
            try:
                self._refresh(released=False)
            except (DpoRayError, OSError) as error:
                # The storage may be back at the next beat; check() decides.
                logger.warning("the lease's heartbeat failed: %s", error)

    def _refresh(self, released: bool) -> None:
        """Write the heartbeat. If another driver has taken a higher number, mark the lease as lost instead."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self.lost or not self._is_held():
                self.lost = True
                return
            beat = {"heartbeats": self._record["heartbeats"] + 1, "heartbeat_boot_seconds": self._clock()}
            self._record |= {**beat, "released": released}
            self.storage.write(_file_name(self.token), _encode(self._record))

    def _remove_older(self) -> None:
        for number in self._numbers():
            if number < self.token:
                self.storage.delete(_file_name(number))

    def _numbers(self) -> list[int]:
        return [int(match.group(1)) for name in self.storage.list_files() if (match := _FILE.fullmatch(name))]

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> dict[str, Any] | None:
        """Read a lease file; return None if it is missing or unreadable. A driver may then take the next number."""
        try:
            record = json.loads(self.storage.read_bytes(_file_name(number)))
            return record if isinstance(record, dict) else None
        except (FileNotFoundError, ValueError, RecursionError):
            return None

    def _held(self, number: int, record: dict[str, Any]) -> LeaseError:
        ttl_seconds = _seconds(record, "ttl_seconds")
        return LeaseError(
            f"the run is held by {record.get('holder')}",
            where=self.storage.full_path(_file_name(number)),
            fix="wait for that driver or stop it; if its machine will not come back, run the same command again: "
            f"the run is free once the driver's heartbeat has been silent for {ttl_seconds:g} s",
        )


def is_free(record: dict[str, Any]) -> bool:
    """Return whether a lease may be taken over at once: it was released, or its holder ended on this machine."""
    process = Process.from_json(record.get("process"))
    return bool(record.get("released")) or (process is not None and process.is_gone())


def _seconds(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < MOST_SECONDS else 0.0  # not for NaN


def _file_name(number: int) -> str:
    return f"lease-{number:06d}.json"


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode("utf-8")
