"""An attempt of a run, made by the driver of a submitted job: its logs are kept, and final errors are noted.

A cluster that is deleted after its job takes all logs with it. So each attempt leaves them in the run's directory:

    logs/attempt-N/attempt.json    the job, the pod, and how the attempt ended
    logs/attempt-N/driver.log      what the driver printed, as it grows
    logs/attempt-N/ray.log         what Ray itself printed in the driver
    logs/attempt-N/NODE/*          the ends of the logs of the workers on each node
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_ray import __version__
from dpo_ray.artifacts.places import run_storage
from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.pod import pod_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import DpoRayError, StoppedError

from .final_error import check_no_final_error, note_final_error
from .job import DriverJob, driver_job
from .redact import secret_values, without_secrets

LOGS = "logs"
ABOUT = "attempt.json"
KEPT_ATTEMPTS = 10
STANDARD_OUTPUT = Path("/proc/self/fd/1")  # Ray's job server sends the driver's output to a file
_ATTEMPT = re.compile(r"attempt-(\d+)")


@contextmanager
def attempt(recipe: Recipe, say: Callable[[str], object], ray_output: Path | None) -> Iterator[None]:
    """Run the `with` block as one attempt, if this process is the driver of a submitted job; otherwise do nothing more.

    Args:
        say: called with the line that names where the logs are.
        ray_output: the file with what Ray prints in this process; None: Ray's output is part of the driver's.

    Raises:
        DpoRayError: an earlier attempt of the same RayJob has ended with this error, which would come again.
    """
    job = driver_job()
    if job is None:
        yield
        return
    directory = run_storage(recipe)
    check_no_final_error(directory, job, recipe)
    number, about = _begin(directory, job)
    logs = directory.child(LOGS, f"attempt-{number}")
    say(f"attempt {number}; its logs are kept in {logs.uri}")
    secrets = secret_values()

    def save(name: str, content: bytes) -> None:
        logs.write(name, without_secrets(content.decode(errors="replace"), secrets).encode())

    from dpo_ray.cluster.worker_logs import kept_worker_logs  # imports Ray, which a noted error does not wait for

    _copy_logs(logs, ray_output)
    code = 1  # of a bug
    try:
        with kept_worker_logs(save):
            yield
        code = 0
    except DpoRayError as error:
        code = error.exit_code
        with suppress(DpoRayError):  # if the storage is away, the attempt's own error is the one to show
            note_final_error(directory, job, recipe, error, number)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except SystemExit:  # Ray exits with it on SIGTERM
        code = StoppedError.exit_code
        raise
    finally:
        ended = about | {"ended": _now(), "exit_code": code}
        with suppress(DpoRayError):
            logs.write(ABOUT, json.dumps(ended, indent=1).encode())


def attempts(directory: Storage) -> list[int]:
    """Return the numbers of the attempts whose logs a run's directory holds, in order."""
    matches = (_ATTEMPT.fullmatch(name) for name in directory.list_dirs(LOGS))
    return sorted(int(match[1]) for match in matches if match)


def _begin(directory: Storage, job: DriverJob) -> tuple[int, dict[str, Any]]:
    """Create the directory of a new attempt, and delete those of the oldest; return its number and its description."""
    before = attempts(directory)
    number = 1 + max(before, default=0)
    while True:
        about = {"attempt": number, **asdict(job), "pod": pod_name(), "version": __version__, "started": _now()}
        try:
            directory.create(f"{LOGS}/attempt-{number}/{ABOUT}", json.dumps(about, indent=1).encode())
        except FileExistsError:  # another driver of this run has just begun; the lease will decide
            number += 1
            continue
        for old in before[: -(KEPT_ATTEMPTS - 1)]:
            directory.delete_tree(f"{LOGS}/attempt-{old}")
        return number, about


def _copy_logs(logs: Storage, ray_output: Path | None) -> None:
    """Start the process that copies this process's output, if that is a file, and Ray's, until this process has ended."""
    sources = [] if ray_output is None else [str(ray_output), "ray.log"]
    if STANDARD_OUTPUT.is_file():
        sources += [os.readlink(STANDARD_OUTPUT), "driver.log"]
    if not sources:
        return
    reading, _ = os.pipe()  # the other end is closed by the system, however this process ends
    subprocess.Popen(  # noqa: S603 - the arguments are our own
        [sys.executable, "-m", "dpo_ray.run.copy_logs", logs.uri, *sources],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the driver's group must not end it first
    )
    os.close(reading)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
