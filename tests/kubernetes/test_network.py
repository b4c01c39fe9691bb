"""Who can reach the ports of a run: its own pods all of them, the operator the dashboard, everybody else none."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dpo_ray.deploy.kubernetes.execute import execute
from tests.helpers.real_cluster import LONG, Command, RealCluster, until

NAME = "network"
GCS, DASHBOARD, METRICS = 6379, 8265, 8080
KNOCK = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), timeout=3).close()
        print(port, end=" ")
    except OSError:
        pass
"""


@pytest.fixture(scope="module")
def run(here: RealCluster) -> Iterator[Command]:
    with here.run(NAME, *LONG) as command:
        command.wait_for("prepare: started", 600)
        yield command


@pytest.fixture(scope="module")
def address(here: RealCluster, run: Command) -> str:
    return here.pods(NAME, "headgroup")[0]["status"]["podIP"]


@pytest.mark.parametrize(
    ("place", "open_ports"),
    [
        ("the same namespace", set()),
        ("another namespace", set()),
        ("the operator's namespace", {DASHBOARD}),
    ],
)
def test_from_outside_the_run(here: RealCluster, address: str, place: str, open_ports: set[int]) -> None:
    from kubernetes import client

    core = client.CoreV1Api(here.connection.client())
    other = f"{here.namespace}-other"
    namespace = {"the same namespace": here.namespace, "another namespace": other}.get(place, "kuberay-system")
    if namespace == other:
        core.create_namespace({"metadata": {"name": other}})
        until("a service account", lambda: core.list_namespaced_service_account(other).items, 30)
    core.create_namespaced_pod(namespace, _visitor(here.image))
    try:
        phase = lambda: core.read_namespaced_pod("visitor", namespace).status.phase  # noqa: E731
        until("the visitor runs", lambda: phase() == "Running", 60)
        time.sleep(10)  # until the network plugin knows its address
        assert _reached(here, namespace, "visitor", "visitor", address) == open_ports
    finally:
        core.delete_namespaced_pod("visitor", namespace, grace_period_seconds=0)
        if namespace == other:
            core.delete_namespace(other)


def test_from_a_pod_of_the_run(here: RealCluster, address: str) -> None:
    worker = until("a training pod", lambda: here.pods(NAME, "training"), 120)[0]["metadata"]["name"]
    assert {GCS, DASHBOARD} <= _reached(here, here.namespace, worker, "ray-worker", address)


def test_a_pod_of_the_run_reaches_no_other_port_outside(here: RealCluster, address: str) -> None:
    """The kubelet's port on the head's node is open to all: only the policy keeps the run from it."""
    head = here.pods(NAME, "headgroup")[0]
    command = ["python", "-c", KNOCK, head["status"]["hostIP"], "10250"]
    done = execute(here.connection, here.namespace, head["metadata"]["name"], "ray-head", command)
    assert done.code == 0, done.errors
    assert done.output == b""


def _reached(here: RealCluster, namespace: str, pod: str, container: str, address: str) -> set[int]:
    command = ["python", "-c", KNOCK, address, *map(str, (GCS, DASHBOARD, METRICS))]
    done = execute(here.connection, namespace, pod, container, command)
    assert done.code == 0, done.errors
    return {int(port) for port in done.output.split()}


def _visitor(image: str) -> dict[str, object]:
    security = {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {"name": "visitor", "image": image, "command": ["sleep", "600"], "securityContext": security}
    return {"metadata": {"name": "visitor"}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 0}}
