"""What Ray prints by itself goes to a file, so that the last lines of a driver's output are its own.

When a node is lost or memory is short, Ray's threads print the state of raylets, its C++ code writes to file descriptor 2,
and Python prints exceptions that Ray's destructors raise as the process ends. None of them names the cause better than the
error of dpo_ray does, and after that error they would hide it: KubeRay, for example, keeps only the last ten lines.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

RAY_THREADS = "ray_"  # the names of Ray's threads in a driver begin with it
STANDARD_ERROR = 2  # file descriptor

_file: TextIO | None = None
_path: Path | None = None


def divert_ray_output() -> Path:
    """Send what Ray prints in this process to a new file, from now until the process ends; return the file's path.

    Standard output and standard error of dpo_ray itself stay where they are. Call this before Ray is imported.
    """
    global _file, _path
    if _path is not None:
        return _path
    descriptor, name = tempfile.mkstemp(prefix=f"dpo-ray-{os.getpid()}-", suffix="-ray.log")
    _path, _file = Path(name), os.fdopen(descriptor, "w", buffering=1, errors="backslashreplace")
    own, before = _own_error_stream(), sys.stderr
    os.dup2(_file.fileno(), STANDARD_ERROR)
    sys.stdout, sys.stderr = _ByThread(sys.stdout, _file), _ByThread(own, _file)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(sys.stderr)
    sys.unraisablehook = _unraisable
    threading.excepthook = _uncaught_in_thread
    return _path


def divert_ray_loggers() -> None:
    """Send the messages of Ray's loggers to the file, too. Call this when Ray has been started."""
    rays: Any = _file
    for name in [n for n in logging.Logger.manager.loggerDict if n == "ray" or n.startswith("ray.")]:
        for handler in logging.getLogger(name).handlers:
            if rays is None or isinstance(handler, logging.FileHandler):
                continue
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(rays)


def ray_output() -> Path | None:
    """Return the path of the file with Ray's output, or None if Ray has printed nothing or its output is not diverted."""
    return _path if _path is not None and _path.exists() and _path.stat().st_size else None


def discard_ray_output() -> None:
    """Delete the file, because the run has succeeded or Ray has printed nothing. Ray may still write to it, unseen."""
    if _path is not None:
        _path.unlink(missing_ok=True)


def _own_error_stream() -> TextIO:
    """Return a stream to where standard error leads now, which stays valid when Ray's descriptor is another one."""
    try:
        is_standard = sys.stderr.fileno() == STANDARD_ERROR
    except (OSError, ValueError):  # a stream in memory
        is_standard = False
    if not is_standard:
        return sys.stderr
    return os.fdopen(os.dup(STANDARD_ERROR), "w", buffering=1, errors="backslashreplace")


class _ByThread(io.TextIOBase):
    """A text stream that writes what Ray's threads print to one stream, and everything else to another."""

    def __init__(self, own: TextIO, rays: TextIO) -> None:
        self._own, self._rays = own, rays

    def _target(self) -> TextIO:
        return self._rays if threading.current_thread().name.startswith(RAY_THREADS) else self._own

    def write(self, text: str) -> int:
        return self._target().write(text)

    def flush(self) -> None:
        self._target().flush()

    def isatty(self) -> bool:
        return self._own.isatty()

    def fileno(self) -> int:
        return self._own.fileno()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own.encoding

    @property
    def errors(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own.errors

    @property
    def buffer(self) -> Any:
        return self._own.buffer


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Write an exception of a destructor to the file."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(found.err_msg or "Exception ignored in", repr(found.object), file=_file)
        traceback.print_exception(found.exc_type, found.exc_value, found.exc_traceback, file=_file)


def _uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    """Write the exception that ended one of Ray's threads to the file; print that of another thread as Python does."""
    if found.thread is not None and found.thread.name.startswith(RAY_THREADS):
        traceback.print_exception(found.exc_type, found.exc_value, found.exc_traceback, file=_file)
    else:
        threading.__excepthook__(found)
