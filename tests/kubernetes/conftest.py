"""One namespace for all tests, on any cluster with the KubeRay operator: the one that KUBECONFIG names.

DPO_RAY_TEST_IMAGE          the image, which the nodes have or can pull (default: dpo-ray:VERSION-cpu)
DPO_RAY_TEST_STORAGE_CLASS  a class that provides ReadWriteMany (default: the cluster's default class)
DPO_RAY_TEST_RESTART_API    a command that restarts the API server and takes some seconds for it
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ray import __version__
from dpo_ray.deploy.kubernetes.client import RAY_JOB, Cluster
from dpo_ray.errors import DpoRayError
from tests.helpers.real_cluster import RealCluster, until

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kubernetes)
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def connection() -> Cluster:
    """Connect to the cluster; skip the tests where there is none, or where it has no operator."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    pytest.importorskip("kubernetes")
    try:
        cluster = Cluster()
        cluster.objects(RAY_JOB, "default")
    except DpoRayError as error:
        pytest.skip(f"no cluster with the KubeRay operator answers: {error.what}")
    return cluster


@pytest.fixture(scope="session")
def namespace(connection: Cluster) -> Iterator[str]:
    """Make a namespace that enforces Pod Security `restricted`; delete it at the end."""
    from kubernetes import client

    name, core = f"dpo-ray-test-{secrets.token_hex(3)}", client.CoreV1Api(connection.client())
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    core.create_namespace({"metadata": {"name": name, "labels": levels}})
    try:
        until("a service account", lambda: core.list_namespaced_service_account(name).items, 30)
        yield name
    finally:
        core.delete_namespace(name)
        end = time.monotonic() + 180
        while time.monotonic() < end and any(n.metadata.name == name for n in core.list_namespace().items):
            time.sleep(1)


@pytest.fixture(scope="session")
def here(connection: Cluster, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> RealCluster:
    """Return the namespace with everything that a recipe needs to run in it."""
    image = os.environ.get("DPO_RAY_TEST_IMAGE", f"dpo-ray:{__version__}-cpu")
    return RealCluster(connection, namespace, image, tmp_path_factory.mktemp("user"))
