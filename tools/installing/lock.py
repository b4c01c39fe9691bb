"""The locked versions: a file of pip's constraints, with the hashes that each download must have."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parents[1] / "locks"
_TORCH = re.compile(r"^torch==.*?[^\\]\n", re.MULTILINE | re.DOTALL)  # the entry, which ends where no backslash follows


def find_uv() -> str:
    """Return the uv of this environment, or of the system.

    Raises:
        SystemExit: there is none.
    """
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if found is None:
        raise SystemExit("there is no uv: run make install first")
    return found


def locked(project: Path, engine: str, torch_version: str) -> str | None:
    """Return the constraints for an engine; None if the project has no lock file.

    The file holds the hashes of PyPI's build of torch. For another build of torch, such as 2.13.0+cpu, its entry is
    left out: `torch_version` itself is exact.
    """
    file = project / "tools" / "locks" / f"{engine}.txt"
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8")
    return _TORCH.sub("", text) if "+" in torch_version else text
