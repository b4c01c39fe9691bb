"""A Ray on this machine that does not come up in time ends the command with one error and the right exit code."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dpo_ray.errors import InfrastructureError
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
START_SECONDS = 300  # until the raylet is there, on a loaded machine
END_SECONDS = 200  # Ray waits 30 s for its raylet


def test_a_raylet_that_is_too_slow_is_an_error_of_the_infrastructure(tmp_path: Path) -> None:
    recipe = REPOSITORY / "pipelines/quickstart.yaml"
    command = [sys.executable, "-m", "dpo_ray", "run", str(recipe), f"output={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        try:
            raylet = wait_for_raylet(driver)
            raylet.send_signal(signal.SIGSTOP)
            said, _ = driver.communicate(timeout=END_SECONDS)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess, UnboundLocalError):
                raylet.kill()
            driver.kill()
    assert driver.returncode == InfrastructureError.exit_code, said
    assert "error: ray.address=local: Ray does not answer: The current node timed out during startup" in said
    assert "less to do" in said
    assert "Traceback" not in said


def wait_for_raylet(driver: subprocess.Popen[str]) -> psutil.Process:
    """Return the raylet of the driver's Ray as soon as there is one."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for process in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    return process
        time.sleep(0.2)
    raise AssertionError("the driver started no raylet")
