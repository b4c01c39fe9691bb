"""Following a run as a user types it: Ctrl-C and a lost API server leave the run alone, and the exit code is the driver's."""

import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")

from dpo_ray.cli.kubernetes import kubernetes
from dpo_ray.errors import LostSightError
from tests.helpers.fakes.api_server import api_server
from tests.helpers.kubernetes import ray_job
from tests.helpers.manifests import PIPELINES, ROOT

QUICKSTART = str(PIPELINES / "quickstart.yaml")
FAILED = (
    "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\n"
    "error: data.train: no row can be used\n  -> name another file\nException ignored in: x\n"
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with api_server(tmp_path / "config") as server:
        yield server


def test_the_end_is_the_one_error_and_the_drivers_exit_code(server):
    server.objects["RayJob", "quickstart"] = ray_job(
        jobDeploymentStatus="Failed", jobStatus="FAILED", failed=4, message=FAILED
    )
    result = CliRunner().invoke(kubernetes, ["watch", QUICKSTART])
    assert result.exit_code == 3
    assert result.stdout[9:] == "failed, after 4 attempts\n"
    assert result.stderr == (
        "exit code 3: The input data cannot be used; for example, no row is usable, or too many rows are invalid\n"
        "error: data.train: no row can be used\n  -> name another file\n"
    )


def test_a_lost_server_says_that_the_run_goes_on(server):
    server.objects["RayJob", "quickstart"] = ray_job(jobDeploymentStatus="Suspended", suspend=True)
    server.steps = [lambda s: s.failures.extend([503] * 9)]
    result = CliRunner().invoke(kubernetes, ["watch", QUICKSTART, "--outage-seconds", "0"])
    assert isinstance(result.exception, LostSightError)
    assert "the run goes on" in result.exception.fix
    assert "dpo-ray kubernetes watch" in result.exception.fix


def test_ctrl_c_ends_only_the_command(server):
    server.objects["RayJob", "quickstart"] = ray_job(jobDeploymentStatus="Running", jobStatus="RUNNING")
    command = [sys.executable, "-m", "dpo_ray", "kubernetes", "watch", QUICKSTART]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert "runs" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the run goes on without this command; to look again: dpo-ray kubernetes watch" in errors
    assert "Traceback" not in errors
    assert all(method == "GET" for method, _ in server.requests)
