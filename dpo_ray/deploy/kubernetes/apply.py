"""Applying the manifests of a run to a cluster, and making room for it where an earlier run of its name stands."""

from __future__ import annotations

import time
from collections.abc import Iterator

from dpo_ray.errors import InfrastructureError, LeaseError
from dpo_ray.observe.text import duration

from .client import CLAIM, POD, Cluster, Json, Resource
from .pods import RUN

RUNNABLE = ("RayJob", "RayCluster")
GONE_SECONDS = 300
TOLD_EVERY_SECONDS = 15.0
POLL_SECONDS = 1.0


def apply(cluster: Cluster, manifests: list[Json], *, replace: bool = False) -> Iterator[str]:
    """Apply manifests to the cluster, in their order in the list; yield a line of text for each manifest.

    Args:
        cluster: The connection to the cluster.
        manifests: The result of `render`.
        replace: First delete an existing RayJob or RayCluster of this name. The new one continues from the committed work.

    Raises:
        LeaseError: a RayJob or RayCluster of this name exists, and `replace` is False.
        InfrastructureError: the cluster does not know a kind, or refuses the request.
        LostSightError: the API server does not answer.
    """
    runs = [m for m in manifests if m["kind"] in RUNNABLE]
    for manifest in runs:  # before anything is changed
        yield from _make_room(cluster, manifest, replace)
    for manifest in manifests:
        yield apply_object(cluster, manifest)


def apply_object(cluster: Cluster, manifest: Json) -> str:
    """Apply a manifest, but leave a claim that exists as it is; return in words what was done."""
    resource, metadata = Resource(manifest["apiVersion"], manifest["kind"]), manifest["metadata"]
    if resource == CLAIM and cluster.get(CLAIM, metadata["namespace"], metadata["name"]):
        return f"{CLAIM.kind}/{metadata['name']}: exists already, and is left as it is"
    cluster.apply(manifest)
    return f"{resource.kind}/{metadata['name']}: applied"


def remove(cluster: Cluster, resource: Resource, namespace: str, name: str) -> Iterator[str]:
    """Delete a RayJob or RayCluster, and wait until its last pod has ended; yield what is waited for.

    Raises:
        InfrastructureError: it still exists after five minutes.
    """
    began = time.monotonic()
    if not cluster.delete(resource, namespace, name):
        return
    yield f"{resource.kind}/{name}: deleting it; its pods end first"
    told = began
    while True:
        pods = cluster.readable(POD, namespace, labels=f"{RUN}={name}") or []
        _end_waiting(cluster, namespace, pods)
        if not pods and cluster.get(resource, namespace, name) is None:
            break
        now = time.monotonic()
        if now - began > GONE_SECONDS:
            fix = f"kubectl describe {resource.kind.lower()} {name} -n {namespace} shows what it waits for"
            what = f"the object still exists {GONE_SECONDS} s after its deletion"
            raise InfrastructureError(what, where=f"{namespace}/{name}", fix=fix)
        if now - told >= TOLD_EVERY_SECONDS:
            told = now
            yield f"{resource.kind}/{name}: since {duration(now - began)} waiting for {_names(pods)}"
        time.sleep(POLL_SECONDS)
    yield f"{resource.kind}/{name}: deleted, with its pods, in {duration(time.monotonic() - began)}"


def _end_waiting(cluster: Cluster, namespace: str, pods: list[Json]) -> None:
    """Delete at once the pods that end before their work began: the operator's container that waits for the head ignores SIGTERM.

    Whoever may not delete pods waits for the end of their grace.
    """
    for pod in pods:
        metadata, phase = pod["metadata"], (pod.get("status") or {}).get("phase")
        if phase == "Pending" and metadata.get("deletionTimestamp") and metadata.get("deletionGracePeriodSeconds"):
            try:
                cluster.delete(POD, namespace, metadata["name"], grace_seconds=0)
            except InfrastructureError:
                return


def _make_room(cluster: Cluster, manifest: Json, replace: bool) -> Iterator[str]:
    resource, metadata = Resource(manifest["apiVersion"], manifest["kind"]), manifest["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    if cluster.get(resource, namespace, name) is None:
        return
    if not replace:
        fix = "watch it with `dpo-ray kubernetes watch`, or use --replace: the run continues from the committed work"
        raise LeaseError(f"a {resource.kind} of this name already exists", where=f"{namespace}/{name}", fix=fix)
    yield from remove(cluster, resource, namespace, name)


def _names(pods: list[Json]) -> str:
    """Return the names of pods that have not ended, with their time to end, or that the object itself remains."""
    if not pods:
        return "the operator, which has not let go of it"
    grace = max((p["metadata"].get("deletionGracePeriodSeconds") or 0 for p in pods), default=0)
    names = ", ".join(p["metadata"]["name"] for p in pods)
    return f"{names}; Kubernetes kills what has not ended after {grace} s" if grace else names
