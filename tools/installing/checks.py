"""What must be right before anything is downloaded: Python's own modules, system libraries, room on the disk."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .stop import Stop

GIB = 1 << 30
BYTECODE_SHARE = 0.02  # of what is installed, and written when it is imported; the cache does not hold it

# What the packages of an engine take on disk, unpacked. That with CUDA is measured; the first is what is
# left of it without CUDA's libraries, the last is worked out from the sizes of the wheels.
PACKAGES_GIB = {"cpu": 3.3, "cpu, torch with CUDA": 7.2, "gpu": 9.0}

# Modules that a Python built from source lacks where a library's header files were missing.
HEADERS_OF_MODULES = {"ssl": "libssl-dev", "ctypes": "libffi-dev", "lzma": "liblzma-dev", "bz2": "libbz2-dev"}

# Libraries that compiled packages link to and do not bring; the packages of Debian and Ubuntu, of Fedora and RHEL.
LIBRARIES = {"libstdc++.so.6": ("libstdc++6", "libstdc++"), "libz.so.1": ("zlib1g", "zlib")}
LIBRARIES_OF_CPU_ENGINE = {"libnuma.so.1": ("libnuma1", "numactl-libs")}


def check_python(needs_ensurepip: bool) -> None:
    """Stop where Python lacks a module that the installation or the packages import."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for module, headers in HEADERS_OF_MODULES.items():
        if not can_import(module):
            raise Stop(
                f"{sys.executable} was built without the module {module}: name another "
                f"(make PYTHON=/path/to/python3.11), or install {headers} (Debian, Ubuntu) and build it again"
            )
    for module in ("venv", *(["ensurepip"] if needs_ensurepip else [])):
        if not can_import(module):
            raise Stop(
                f"{sys.executable} has no module {module}, which makes environments: apt-get install "
                f"python{version}-venv (Debian, Ubuntu), or name another (make PYTHON=/path/to/python3.11)"
            )


def can_import(module: str) -> bool:
    """Return whether a module is there and whole."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def libraries_needed(engine: str) -> dict[str, tuple[str, str]]:
    """Return the system libraries that the packages link to on this platform."""
    if sys.platform != "linux":
        return {}
    with_vllm_cpu = engine == "cpu" and platform.machine() == "x86_64"
    return LIBRARIES | (LIBRARIES_OF_CPU_ENGINE if with_vllm_cpu else {})


def check_libraries(libraries: dict[str, tuple[str, str]]) -> None:
    """Stop where the dynamic linker does not find one of the libraries."""
    import ctypes

    missing = []
    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError:
            missing.append(library)
    if missing:
        debian, fedora = (" ".join(libraries[library][i] for library in missing) for i in (0, 1))
        raise Stop(
            f"the system lacks {', '.join(missing)}, which compiled packages link to: "
            f"apt-get install {debian} (Debian, Ubuntu) or dnf install {fedora} (Fedora, RHEL)"
        )


def check_room(venv: Path, cache: Path, packages_bytes: int) -> None:
    """Stop where the disks of the environment and of uv's cache have too little room for what is not there yet.

    Files of the environment are links to those of the cache, where both are on one disk. What lies in the cache is
    taken as what this installation needs: it may be of other projects, and then a full disk is found later; but an
    installation that has room is never refused.
    """
    for place, needed in room_needed(venv, cache, packages_bytes):
        free = shutil.disk_usage(nearest(place)).free
        if free < needed:
            raise Stop(
                f"{place} has {free / GIB:.1f} GiB free and the packages take some {needed / GIB:.1f} GiB there: "
                "free some space, or move the environment (make VENV=/path) or uv's cache (UV_CACHE_DIR=/path)"
            )


def room_needed(venv: Path, cache: Path, packages_bytes: int) -> list[tuple[Path, int]]:
    """Return the bytes that will be written to each disk: one place where files can be linked, else two."""
    in_cache = bytes_below(cache, packages_bytes)
    in_venv = bytes_below(venv, packages_bytes)
    bytecode = int(packages_bytes * BYTECODE_SHARE)
    if can_link(cache, venv):
        missing = packages_bytes - max(in_cache, in_venv)
        return [(venv, max(missing, 0 if in_venv >= packages_bytes else bytecode))]
    return [(venv, max(packages_bytes - in_venv, 0)), (cache, max(packages_bytes - bytecode - in_cache, 0))]


def nearest(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    return path if path.is_dir() else nearest(path.parent)


def can_link(cache: Path, venv: Path) -> bool:
    """Return whether a file of the cache can be linked into the environment, by trying it."""
    try:
        with (
            tempfile.TemporaryDirectory(dir=nearest(cache), prefix=".link-") as here,
            tempfile.TemporaryDirectory(dir=nearest(venv), prefix=".link-") as there,
        ):
            (Path(here) / "file").touch()
            os.link(Path(here) / "file", Path(there) / "file")
    except OSError:
        return False
    return True


def bytes_below(directory: Path, enough: int = sys.maxsize) -> int:
    """Return the bytes that files below a directory take on the disk, linked ones once; stop counting at `enough`."""
    total, counted = 0, set()
    for status in _files_below(directory):
        if status.st_nlink > 1:
            if status.st_ino in counted:
                continue
            counted.add(status.st_ino)
        total += status.st_blocks * 512
        if total >= enough:
            break
    return total


def _files_below(directory: Path) -> Iterable[os.stat_result]:
    for path, _, files in os.walk(directory):
        for file in files:
            try:
                yield os.lstat(os.path.join(path, file))
            except OSError:  # somebody else has just removed it
                continue
