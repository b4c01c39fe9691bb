"""Kueue admits a run, preempts it for one of higher priority, and brings it back, which then goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dpo_ray.deploy.kubernetes.client import Resource
from tests.helpers.real_cluster import HAS_CHECKPOINT, LONG, SMALL, RealCluster

VERSION = "v1beta2"
PODS_OF_A_RUN = 5
QUEUED = ("cluster.kubernetes.autoscaling=false",)


@pytest.fixture(scope="module")
def queue(here: RealCluster) -> Iterator[str]:
    """Make a queue with room for one run, and two priorities; skip where Kueue is not installed."""
    from kubernetes import client

    if here.connection.readable(Resource(f"kueue.x-k8s.io/{VERSION}", "Workload"), here.namespace) is None:
        pytest.skip(f"Kueue with its API {VERSION} is not installed")
    api: Any = client.CustomObjectsApi(here.connection.client())
    name = here.namespace
    flavor = {"kind": "ResourceFlavor", "metadata": {"name": name}}
    quota = {"name": "pods", "nominalQuota": PODS_OF_A_RUN}
    rooms = [{"name": resource, "nominalQuota": "1000Gi"} for resource in ("cpu", "memory")]
    cluster_queue = {
        "kind": "ClusterQueue",
        "metadata": {"name": name},
        "spec": {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [
                {
                    "coveredResources": ["cpu", "memory", "pods"],
                    "flavors": [{"name": name, "resources": [*rooms, quota]}],
                }
            ],
        },
    }
    classes = [
        {"kind": "WorkloadPriorityClass", "metadata": {"name": f"{name}-{word}"}, "value": value, "description": word}
        for word, value in (("usual", 10), ("urgent", 100))
    ]
    local = {"kind": "LocalQueue", "metadata": {"name": "research"}, "spec": {"clusterQueue": name}}
    made = []
    try:
        for each in (flavor, cluster_queue, *classes):
            plural = each["kind"].lower().rstrip("s") + ("es" if each["kind"].endswith("Class") else "s")
            plural = {"WorkloadPriorityClass": "workloadpriorityclasses"}.get(each["kind"], plural)
            body = {"apiVersion": f"kueue.x-k8s.io/{VERSION}", **each}
            api.create_cluster_custom_object("kueue.x-k8s.io", VERSION, plural, body)
            made.append((plural, each["metadata"]["name"]))
        body = {"apiVersion": f"kueue.x-k8s.io/{VERSION}", **local}
        api.create_namespaced_custom_object("kueue.x-k8s.io", VERSION, here.namespace, "localqueues", body)
        yield "research"
    finally:
        for plural, each in reversed(made):
            api.delete_cluster_custom_object("kueue.x-k8s.io", VERSION, plural, each)


def _queue(here: RealCluster, queue: str, priority: str) -> str:
    values = f"type: kueue, name: {queue}, priority_class: {here.namespace}-{priority}"
    return "cluster.kubernetes.queue={" + values + "}"


def test_an_urgent_run_takes_the_place_of_another_which_comes_back(here: RealCluster, queue: str) -> None:
    with here.run("usual", *LONG, *QUEUED, _queue(here, queue, "usual")) as usual:
        usual.wait_for(HAS_CHECKPOINT, 600)
        with here.run("urgent", *SMALL, *QUEUED, _queue(here, queue, "urgent")) as urgent:
            usual.wait_for("suspend", 120)
            usual.wait_for("Kueue took its place away", 60)
            assert urgent.end(600) == 0, urgent.text
        usual.wait_for("resuming from the checkpoint of step [1-9]", 600)
        assert here.job("usual")["status"].get("failed", 0) == 0


def test_a_run_that_never_fits_is_told_why(here: RealCluster, queue: str) -> None:
    many = "train.workers=12"
    with here.run("too-large", *SMALL, many, *QUEUED, _queue(here, queue, "usual")) as run:
        began = run.wait_for("RayJob/.*: applied", 60)
        assert run.wait_for("waits: queue: .*(insufficient|couldn't assign)", 60) - began < 15
