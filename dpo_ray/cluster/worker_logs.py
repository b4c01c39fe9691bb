"""The ends of the logs of a run's workers, which are lost with their pods: they are read on every node and saved.

Ray writes what each process prints to a file of its node. A driver that keeps them registers one function that saves a
file; the connection to Ray is one for the whole process, and so is this function.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private import worker as rays_worker

from dpo_ray.errors import DpoRayError

from .each_node import on_each_node
from .pod import POD_VARIABLE

logger = logging.getLogger(__name__)
Save = Callable[[str, bytes], None]
END_BYTES = 256 << 10  # of each file
MOST_FILES = 40  # of a node: those that were written last
DEADLINE_SECONDS = 20.0
PAUSE_SECONDS = 60.0  # between two savings after losses
OF_RAY = ("raylet.out", "raylet.err")
_MARK = re.compile(rb"^:(job_id|actor_name|task_name):(.*)$", re.MULTILINE)

_save: Save | None = None
_saved_at = 0.0
_lock = threading.Lock()


@contextmanager
def kept_worker_logs(save: Save) -> Iterator[None]:
    """In the `with` block, save the ends of the workers' logs with `save(NODE/FILE, content)`."""
    global _save
    before, _save = _save, save
    try:
        yield
    finally:
        _save = before


@contextmanager
def saved_at_the_end() -> Iterator[None]:
    """Save the ends of all logs when the `with` block ends, before the connection to Ray is closed.

    If the process is interrupted or Ray is lost, save those of this node only, without asking Ray.
    """
    if _save is None:
        yield
        return
    directory, node, job = _directory(), node_name(), ray.get_runtime_context().get_job_id()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _save_files(node, ends_of_logs(directory, job))
        raise
    except BaseException:
        _save_all(job)
        raise
    else:
        _save_all(job)


def save_after_a_loss() -> None:
    """Save the ends of all logs in the background, because a worker was lost; not more often than once a minute."""
    global _saved_at
    with _lock:
        if _save is None or time.monotonic() - _saved_at < PAUSE_SECONDS:
            return
        _saved_at = time.monotonic()
    job = ray.get_runtime_context().get_job_id()
    threading.Thread(target=_save_all, args=(job,), name="save-logs", daemon=True).start()


def node_name() -> str:
    """Return the name of this node: of its pod, or of its machine with Ray's id, as a machine may have several nodes."""
    return os.environ.get(POD_VARIABLE) or f"{socket.gethostname()}-{ray.get_runtime_context().get_node_id()[:8]}"


def ends_of_logs(directory: Path, job: str) -> list[tuple[str, bytes]]:
    """Return the name and the end of each log in a directory of Ray's logs that a worker of this job has written to.

    A name begins with that of the worker's actor, or with `tasks`.
    """
    files = [*directory.glob("worker-*.out"), *directory.glob("worker-*.err")]
    written = [(status.st_mtime, file) for file in files if (status := file.stat()).st_size and _is_of(job, file)]
    newest = [file for _, file in sorted(written, reverse=True)[:MOST_FILES]]
    ends = [(_name(file), _end(file)) for file in newest]
    ends += [(name, _end(directory / name)) for name in OF_RAY if (directory / name).exists()]
    return [(name, end) for name, end in ends if _MARK.sub(b"", end).strip()]


def _ends_here(job: str) -> tuple[str, list[tuple[str, bytes]]]:
    """Return the name of this node and the ends of its logs; this runs as a task on each node."""
    return node_name(), ends_of_logs(_directory(), job)


def _save_all(job: str) -> None:
    """Save the ends of the logs of all nodes that answer in time."""
    for node, files in on_each_node(_ends_here, job, deadline_seconds=DEADLINE_SECONDS):
        _save_files(node, files)


def _save_files(node: str, files: list[tuple[str, bytes]]) -> None:
    for name, content in files:
        if (save := _save) is None:
            return
        try:
            save(f"{node}/{name}", content)
        except DpoRayError as error:  # the run's own result does not depend on its logs
            logger.warning("the workers' logs cannot be saved: %s", error.what)
            return


def _directory() -> Path:
    """Return the directory of Ray's logs on this node."""
    node = rays_worker._global_node
    assert node is not None  # noqa: S101 - the caller is connected to Ray
    return Path(node.get_logs_dir_path())


def _is_of(job: str, file: Path) -> bool:
    """Return whether a worker belongs to a job. A worker that was started in advance names its job only in the file."""
    return f"-{job}-" in file.name or _marks(file).get(b"job_id") == job.encode()


def _marks(file: Path) -> dict[bytes, bytes]:
    """Return what Ray has written about a worker at the beginning of its file."""
    with file.open("rb") as stream:
        return dict(_MARK.findall(stream.read(1024)))


def _name(file: Path) -> str:
    """Return a name such as `Engine-1234.err` for a worker's file `worker-<id>-<job>-<process id>.err`."""
    actor = re.sub(r"[^\w.-]", "_", _marks(file).get(b"actor_name", b"tasks").decode(errors="replace"))
    return f"{actor}-{file.stem.rpartition('-')[2]}{file.suffix}"


def _end(file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - END_BYTES))
        return stream.read(END_BYTES)
