"""The virtual environment that TRL runs in: TRL beside the same torch, transformers and tokenizers as dpo_ray's own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

TRL = "1.16.0"
SAME_HERE = ("torch", "transformers", "tokenizers", "pyarrow", "datasets")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def cache_directory() -> Path:
    """Name the place for what benchmarks make once: the environment, rows, models."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dpo_ray" / "benchmarks"


def trl_python(directory: Path | None) -> Path:
    """Return the Python that has TRL, after making its environment (about two minutes) if it is not there.

    Raises:
        SystemExit: pip cannot install it, or the directory holds something else.
    """
    pins = [f"trl=={TRL}", *(f"{name}=={version(name)}" for name in SAME_HERE)]
    directory = directory or cache_directory() / f"trl-{TRL}"
    python, installed = directory / "bin" / "python", directory / "installed.txt"
    if installed.exists() and installed.read_text() == "\n".join(pins):
        return python
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "pyvenv.cfg").exists():
        sys.exit(f"{directory} is not empty and no virtual environment: name another directory")
    print(f"making TRL's environment in {directory}: {' '.join(pins)}", file=sys.stderr)
    venv.create(directory, with_pip=True)
    install = [str(python), "-m", "pip", "install", "-q", *pins]
    # A CPU build of torch may not be on the index that pip asks: then PyTorch's own is asked too.
    if subprocess.run(install, capture_output=True).returncode:
        told = subprocess.run([*install, "--extra-index-url", TORCH_CPU_INDEX], capture_output=True, text=True)
        if told.returncode:
            sys.exit(f"TRL's environment cannot be made: {told.stderr.strip()[-2000:]}")
    installed.write_text("\n".join(pins))
    return python
