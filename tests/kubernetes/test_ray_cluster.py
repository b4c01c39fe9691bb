"""A RayCluster that stays: recipes are sent to it with `dpo-ray submit`, through a port that kubectl forwards."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from dpo_ray.deploy.kubernetes.client import RAY_CLUSTER
from tests.helpers.local_cluster import free_port
from tests.helpers.real_cluster import ROOT, SMALL, RealCluster, until

NAME = "stays"
IDLE = "cluster.kubernetes.idle_seconds=60"
RECIPE = str(ROOT / "pipelines" / "quickstart.yaml")


@pytest.fixture(scope="module")
def client_environment(here: RealCluster) -> Iterator[dict[str, str]]:
    """Apply the RayCluster, and forward a port of this machine to its dashboard."""
    from kubernetes import client

    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which forwards the port, is not installed")
    done = here.dpo_ray("kubernetes", "apply", RECIPE, *here.overrides(NAME, *SMALL), IDLE, "--kind", "RayCluster")
    assert done.returncode == 0, done.stderr
    try:
        until("the head is ready", lambda: _head_is_ready(here), 180)
        core, port = client.CoreV1Api(here.connection.client()), free_port()
        secret = core.read_namespaced_secret(NAME, here.namespace)
        token = base64.b64decode(secret.data["auth_token"]).decode()
        forward = ["kubectl", "port-forward", "-n", here.namespace, f"service/{NAME}-head-svc", f"{port}:8265"]
        forwarding = subprocess.Popen(forward, stdout=subprocess.PIPE, text=True)
        assert forwarding.stdout is not None
        assert "Forwarding" in forwarding.stdout.readline()
        try:
            yield {"DPO_RAY_ADDRESS": f"http://127.0.0.1:{port}", "RAY_AUTH_TOKEN": token}
        finally:
            forwarding.kill()
    finally:
        here.dpo_ray("kubernetes", "delete", NAME, "--namespace", here.namespace)


def test_a_recipe_is_submitted_and_runs_to_its_end(here: RealCluster, client_environment: dict[str, str]) -> None:
    user = _with(here, client_environment)
    recipe_values = ("name=sent", f"output=/mnt/shared/{here.namespace}/sent", *SMALL)
    submitted = user.start("submit", RECIPE, *recipe_values, "--wait")
    assert submitted.end(600) == 0, submitted.text
    assert "no node has a GPU now" not in submitted.text
    assert " policy=" in submitted.text
    listed = user.dpo_ray("list")
    assert "sent" in listed.stdout


def test_its_engines_leave_when_they_are_idle(here: RealCluster, client_environment: dict[str, str]) -> None:
    until("no engine", lambda: not here.pods(NAME, "engines"), 180, pause=2)
    assert here.pods(NAME, "training")


def _with(here: RealCluster, environment: dict[str, str]) -> RealCluster:
    return RealCluster(here.connection, here.namespace, here.image, here.directory, environment)


def _head_is_ready(here: RealCluster) -> bool:
    found = here.connection.get(RAY_CLUSTER, here.namespace, NAME)
    conditions = ((found or {}).get("status") or {}).get("conditions") or []
    return any(c["type"] == "HeadPodReady" and c["status"] == "True" for c in conditions)
