"""A lease that allows only one driver at a time to write to a run, on disks and in object stores.

Lease files are numbered: lease-000001.json, lease-000002.json, ... The file with the highest number is the lease.
A driver takes the lease over by creating the file with the next number. Only one driver can create it, so exactly one
of several drivers wins; the number is the fencing token. A thread of the holder rewrites its file regularly as a
heartbeat.
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
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from dpo_ray.errors import DpoRayError, LeaseError

from .process import Process, user_name
from .storage import Storage

logger = logging.getLogger(__name__)

MAX_CLOCK_SKEW_SECONDS = 5.0  # the clocks of a cluster's machines are assumed to differ by less
MAX_TRIES = 20
_FILE = re.compile(r"lease-(\d{6,})\.json")


class Lease:
    """The right to write to a run, as a context: entering acquires the lease or raises LeaseError; leaving releases it.

    A lease is free if its holder has released it, if its heartbeat is older than its `ttl_seconds`, or if its holder
    was a process of this machine and has ended.
    """

    def __init__(self, storage: Storage, holder: str = "", ttl_seconds: float = 60.0) -> None:
        """Prepare a lease whose files are in `storage`. Errors of other drivers show `holder` (default: user, host, pid)."""
        self.storage, self.ttl_seconds = storage, ttl_seconds
        self.token = 0  # grows with every acquisition; 0 before the first
        self.lost = False
        self._holder = holder
        self._record: dict[str, Any] = {}
        self._pid = 0
        self._refreshed_unix_seconds = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Acquire the lease. If a driver that is still alive holds it, raise a LeaseError that names this holder."""
        for _ in range(MAX_TRIES):
            highest = self._highest()
            if highest:
                record = self._read(highest)
                if record is not None and not is_free(record, time.time()):
                    raise self._held(highest, record)
            if self._take(highest + 1):
                self._start()
                return self
        raise LeaseError("other drivers keep taking the lease", where=self.storage.uri, fix="run only one of them")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease and remove older lease files. In a forked child process, do nothing: the parent does this."""
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
        """Raise LeaseError if another driver has taken over the run. Call this before every commit.

        If the last heartbeat is older than `ttl_seconds`, for example because the machine was suspended, the lease
        files are read again first.
        """
        if not self.lost and time.time() - self._refreshed_unix_seconds > self.ttl_seconds:
            self._refresh(released=False)
        if self.lost:
            raise LeaseError(
                f"this driver lost the run: another driver took over lease {self.token}",
                where=self.storage.uri,
                fix="let the other driver continue; it uses everything that this driver has committed",
            )

    def _take(self, number: int) -> bool:
        now, process = time.time(), Process.current()
        since = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        self._record = {
            "holder": self._holder or f"{user_name()}@{process.host} pid {process.pid} since {since}",
            "process": dataclasses.asdict(process),
            "nonce": secrets.token_hex(8),
            "ttl_seconds": self.ttl_seconds,
            "heartbeat_unix_seconds": now,
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
        self.token, self.lost, self._pid, self._refreshed_unix_seconds = number, False, process.pid, now
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
            # Higher: taken over. None or lower: our file was deleted by hand, so any driver may take the run.
            if self._highest() != self.token:
                self.lost = True
                return
            now = time.time()
            self._record |= {"heartbeat_unix_seconds": now, "released": released}
            self.storage.write(_file_name(self.token), _encode(self._record))
            self._refreshed_unix_seconds = now

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
        ttl = _number(record, "ttl_seconds")
        return LeaseError(
            f"the run is held by {record.get('holder')}",
            where=self.storage.full_path(_file_name(number)),
            fix="wait for it or stop it; "
            f"if its machine will not come back, the run is free {ttl:g} s after the last heartbeat",
        )


def is_free(record: dict[str, Any], now_unix_seconds: float) -> bool:
    """Return whether a lease may be taken over. The age of its heartbeat is measured by wall clocks, which may differ."""
    if record.get("released"):
        return True
    process = Process.from_json(record.get("process"))
    if process is not None and process.is_gone():
        return True
    ttl = _number(record, "ttl_seconds")
    age_seconds = now_unix_seconds - _number(record, "heartbeat_unix_seconds")
    return age_seconds > ttl + min(MAX_CLOCK_SKEW_SECONDS, ttl)


def _number(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _file_name(number: int) -> str:
    return f"lease-{number:06d}.json"


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode("utf-8")
