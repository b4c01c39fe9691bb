"""Every combination of options is accepted by the API server itself, and its pods by Pod Security `restricted`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_ray.deploy.kubernetes.client import MANAGER, Cluster, Resource
from dpo_ray.deploy.kubernetes.render import render, stamped
from tests.helpers.manifests import MATRIX, MATRIX_IDS, recipe
from tests.helpers.real_cluster import RealCluster

Json = dict[str, Any]


@pytest.mark.parametrize(("pipeline", "overrides"), MATRIX, ids=MATRIX_IDS)
def test_the_api_server_accepts_it_without_a_warning(
    here: RealCluster, pipeline: str, overrides: tuple[str, ...]
) -> None:
    manifests = stamped(render(recipe(pipeline, *overrides)))
    ray_cluster = manifests[-1]["spec"]["rayClusterSpec"]
    groups = [ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]]
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            **group["template"],
            "metadata": {**group["template"]["metadata"], "name": "x"},
        }
        for group in groups
    ]
    warnings = []
    for manifest in [*manifests, *pods]:
        if manifest["kind"] == "PodMonitor" and not _knows_pod_monitors(here.connection):
            continue
        manifest["metadata"]["namespace"] = here.namespace
        if manifest["kind"] == "Pod":
            manifest["spec"]["serviceAccountName"] = "default"  # that of the run is not there in a dry run
        warnings += _dry_run(here.connection, manifest)
    assert warnings == []


def _dry_run(connection: Cluster, manifest: Json) -> list[str]:
    """Ask the API server to check an object without keeping it; return its warnings. A refusal raises."""
    metadata = manifest["metadata"]
    path = Resource(manifest["apiVersion"], manifest["kind"]).path(metadata["namespace"], metadata["name"])
    _, _, headers = connection.client().call_api(
        path,
        "PATCH",
        query_params=[("dryRun", "All"), ("fieldManager", MANAGER), ("fieldValidation", "Strict"), ("force", "true")],
        header_params={"Accept": "application/json", "Content-Type": "application/apply-patch+yaml"},
        body=json.loads(json.dumps(manifest)),
        auth_settings=["BearerToken"],
        _preload_content=False,
    )
    return [value for key, value in headers.items() if key.lower() == "warning"]


def _knows_pod_monitors(connection: Cluster) -> bool:
    return connection.readable(Resource("monitoring.coreos.com/v1", "PodMonitor"), "default") is not None
