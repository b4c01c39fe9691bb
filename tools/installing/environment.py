"""The virtual environment: whose it is, whether it is whole, and one installation in it at a time.

Two empty files tell its state. `MADE` stands in an environment that this tool made, `UNFINISHED` while packages go
into one. An installer that is killed leaves half-linked packages, which uv then takes as installed. So an environment of
ours that is unfinished is removed and made again: uv's cache still has the packages. One that the user made is never
removed: its packages are all installed again, over what is there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .stop import Stop

MADE, UNFINISHED, LOG = ".dpo-ray-made", ".dpo-ray-unfinished", "install.log"
SUPPORTED = ("3.11", "3.12", "3.13")
LOCK_SECONDS = 1.0  # a killed installer's uv holds the lock for a moment longer


@dataclass(frozen=True)
class Change:
    """An installation that is under way in an environment."""

    lock: int  # the file descriptor that keeps others out
    interrupted_before: bool


@dataclass(frozen=True)
class Environment:
    """One virtual environment, there or not."""

    path: Path

    @property
    def name(self) -> str:
        """Return the path as short as a user would write it."""
        return str(self.path.relative_to(Path.cwd())) if self.path.is_relative_to(Path.cwd()) else str(self.path)

    @property
    def python(self) -> Path:
        """Return the path of its Python."""
        return self.path / "bin" / "python"

    @property
    def log(self) -> Path:
        """Return the path of the file with all that was printed while packages were installed."""
        return self.path / LOG

    @property
    def ours(self) -> bool:
        """Return whether this tool made it, or may make it because nothing is there."""
        return (self.path / MADE).exists() or {child.name for child in _children(self.path)} <= {UNFINISHED, LOG}

    def python_version(self) -> str:
        """Return the minor version of its Python, such as 3.11; nothing where it does not run."""
        try:
            asked = [str(self.python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        except (OSError, subprocess.CalledProcessError):
            return ""

    def distribution(self, name: str) -> Path | None:
        """Return the directory with an installed distribution's metadata; `name` as wheels spell it."""
        return next(iter(sorted(self.path.glob(f"lib/python3*/site-packages/{name}-*.dist-info"))), None)

    def version_of(self, name: str) -> str:
        """Return the version of an installed distribution, or nothing."""
        found = self.distribution(name)
        return found.name.removesuffix(".dist-info").split("-")[1] if found else ""

    def check_users_own(self) -> None:
        """Stop where something is there that this tool neither made nor can install into."""
        if self.ours:
            return
        if not (self.path / "pyvenv.cfg").exists():
            raise Stop(
                f"{self.name} is there and is no virtual environment: remove it, or name another (make VENV=/path)"
            )
        version = self.python_version()
        if version not in SUPPORTED:
            found = f"has Python {version}" if version else "has a Python that does not run"
            needed = "3.11, 3.12 or 3.13 is needed"
            raise Stop(f"{self.name} {found}, and {needed}: remove it, or name another (make VENV=/path)")

    def fault(self, interrupted: bool, other_engine: str) -> str:
        """Return why one that this tool made cannot be used as it is; nothing where it can, or is not there."""
        if not (self.path / MADE).exists():
            return ""
        if interrupted:
            return "an installation in it was interrupted"
        if self.python_version() not in SUPPORTED:
            return "its Python does not run, or is too old"
        return f"it has the other engine, {other_engine.replace('_', '-')}" if self.distribution(other_engine) else ""

    def remove(self) -> None:
        """Remove all that is in it. What marks it as ours and unfinished goes last: this too may be interrupted."""
        for child in _children(self.path):
            if child.name in (MADE, UNFINISHED):
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def mark_as_ours(self) -> None:
        """Mark it as made by this tool."""
        (self.path / MADE).touch()

    @contextmanager
    def being_changed(self) -> Iterator[Change]:
        """Mark it unfinished and keep others out, until the block has ended well or has changed nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        marker = self.path / UNFINISHED
        lock, interrupted = _locked(marker)
        before = self._packages_state()
        try:
            yield Change(lock, interrupted)
            marker.unlink()
        except BaseException:
            if before and not interrupted and self._packages_state() == before:
                marker.unlink(missing_ok=True)  # a download failed, say: what was there is as whole as it was
            raise
        finally:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _packages_state(self) -> list[int]:
        """Return what changes when a package comes or goes."""
        return [directory.stat().st_mtime_ns for directory in self.path.glob("lib/python3*/site-packages")]


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _locked(marker: Path) -> tuple[int, bool]:
    """Open and lock a file; return it and whether a process that has ended left it. Stop where one still holds it."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        left = marker.exists()
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise Stop(f"another installation is at work in {marker.parent}: wait until it has ended") from None
            time.sleep(0.1)
            continue
        except OSError:  # a file system without locks: nothing keeps others out there
            return descriptor, left
        if marker.exists() and os.fstat(descriptor).st_ino == marker.stat().st_ino:
            return descriptor, left
        os.close(descriptor)  # the process that held it has ended well and removed it
