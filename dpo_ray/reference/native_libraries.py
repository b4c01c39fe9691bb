"""Checks that this machine can load the native libraries of torch and vLLM. It imports neither.

vLLM only logs a warning if a library of its own cannot be loaded, and fails later with an error that does not name the
cause. The libraries are loaded in a process of their own, because a library for another processor ends its process.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 300.0  # importing torch takes seconds, on a busy machine many

# The packages of Debian and Ubuntu, and of Fedora and RHEL, that contain a shared library.
PACKAGES = {
    "libnuma.so.1": ("libnuma1", "numactl-libs"),
    "libgomp.so.1": ("libgomp1", "libgomp"),
    "libstdc++.so.6": ("libstdc++6", "libstdc++"),
    "libgcc_s.so.1": ("libgcc-s1", "libgcc"),
    "libz.so.1": ("zlib1g", "zlib"),
}
DRIVER, DEVICE = "libcuda.so.1", Path("/dev/nvidiactl")  # of NVIDIA
_UNUSABLE = re.compile(r"^(?:\S*/)?(?P<library>[^\s/]+\.so[\w.]*): ")

# Prints one line for each library that cannot be loaded: the library's file, a tab, the linker's reason.
PROGRAM = """
import ctypes, importlib.util, pathlib
try:
    import torch
except (ImportError, OSError) as error:
    print(f"torch\\t{error}", flush=True)
else:
    vllm = importlib.util.find_spec("vllm")
    for file in sorted(pathlib.Path(vllm.origin).parent.glob("*.so")) if vllm and vllm.origin else ():
        try:
            ctypes.CDLL(str(file))
        except OSError as error:
            print(f"vllm/{file.name}\\t{error}", flush=True)
"""


@dataclass(frozen=True)
class Fault:
    """A native library of a Python package that cannot be loaded, and the linker's reason."""

    file: str  # such as vllm/_C.abi3.so, or torch
    reason: str

    @property
    def missing(self) -> str | None:
        """Return the name of the shared library that the file needs and cannot use; None if the file itself is wrong."""
        match = _UNUSABLE.match(self.reason)
        return match["library"] if match and match["library"] != Path(self.file).name else None


def library_faults() -> list[Fault]:
    """Load the native libraries of torch and vLLM as an engine does, and list those that cannot be loaded.

    A machine without a GPU of NVIDIA also lacks the driver's library, which is no fault. What a crash or the time limit
    leaves unexamined is not listed.
    """
    try:
        output = subprocess.run(  # noqa: S603 - a program of our own
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=SECONDS, check=False
        ).stdout
    except subprocess.TimeoutExpired:
        return []
    faults = [Fault(*line.split("\t", 1)) for line in output.splitlines() if "\t" in line]
    return [fault for fault in faults if fault.missing != DRIVER or DEVICE.exists()]


def what_is_wrong(faults: Sequence[Fault]) -> str:
    """Describe faults in one sentence. Of the files that need the same missing library, only the first one is named."""
    first = {fault.missing or fault.reason: fault for fault in reversed(faults)}
    return "; ".join(f"{fault.file} cannot be loaded: {fault.reason}" for fault in reversed(first.values()))


def how_to_fix(faults: Sequence[Fault]) -> str:
    """Return what to install: the packages of the missing libraries, or torch and vLLM themselves."""
    missing = sorted({fault.missing for fault in faults if fault.missing})
    if DRIVER in missing:
        return "install NVIDIA's driver; a container needs NVIDIA's runtime, which brings the driver's libraries"
    if not missing:
        return "make install, in a new .venv: torch and vLLM do not fit each other, or their files are damaged"
    if all(library in PACKAGES for library in missing):
        debian, fedora = (" ".join(PACKAGES[library][i] for library in missing) for i in (0, 1))
        return f"apt-get install {debian} (Debian, Ubuntu) or dnf install {fedora} (Fedora, RHEL)"
    names = " ".join(missing)
    return f"install the packages that contain {names}: apt-file search NAME (Debian, Ubuntu), dnf provides '*/NAME' (Fedora, RHEL)"
