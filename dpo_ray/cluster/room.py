"""Free resources on the cluster: counting how many identical workers fit in them, and waiting for more."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray import PlacementGroupID
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - compiled
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from dpo_ray.errors import StoppedError

from .node_groups import capacity_of, has_labels, node_groups
from .requests import fitting
from .resources import Resources

PATIENCE_SECONDS = 30.0  # to wait for all workers, before fewer of them start
SCALING_PATIENCE_SECONDS = 600.0  # the same on a cluster that adds nodes on demand, which takes minutes
PROBE_SECONDS = 3.0  # Ray grants free room within this time
SAY_SECONDS = 30.0
ASK_SECONDS = 10.0


def capacity(request: Resources) -> int:
    """Return how many workers with this request fit on the present nodes if nothing else runs there."""
    nodes = [n for n in ray.nodes() if n["Alive"] and has_labels(n.get("Labels") or {}, request.labels)]
    return sum(fitting(request, node["Resources"]) for node in nodes)


def later_capacity(request: Resources) -> int:
    """Return how many workers with this request fit on the present nodes, or on those that the cluster may ever have.

    The second number is 0 if the cluster does not name its groups of nodes.
    """
    return max(capacity(request), capacity_of(node_groups(), request))


def scales() -> bool:
    """Return whether an autoscaler (Ray's version 2, as on Kubernetes) is alive and adds nodes for waiting requests.

    An autoscaler does not report which nodes it can add. So workers that do not fit now may fit later, unless the
    cluster names its groups of nodes (`node_groups`).
    """
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue] - generated
    reply.ParseFromString(client.get_cluster_status(timeout_s=ASK_SECONDS))
    return reply.autoscaling_state.autoscaler_state_version > 0


def wait(
    request: Resources,
    least: int,
    most: int,
    say: Callable[[str], None],
    gives_up: Callable[[], bool] = lambda: False,
    patience_seconds: float | None = None,
) -> int:
    """Wait until `most` workers can start, or after `patience_seconds` at least `least`; return how many can start.

    The workers are requested as a placement group of Ray, so a cluster with an autoscaler adds nodes for them. Every
    half minute, `say` reports how many workers fit on the nodes.

    Args:
        gives_up: called every few seconds; the wait ends when it returns True.
        patience_seconds: how long to wait before fewer than `most` workers are enough. Default: 30 s, or 10 minutes on
            a cluster that may add nodes.

    Raises:
        StoppedError: `gives_up` returned True.
    """
    patience = patience_seconds
    if patience is None:
        patience = SCALING_PATIENCE_SECONDS if least < most and scales() else PATIENCE_SECONDS
    began = time.monotonic()
    said_at = began
    with _reserved(request, most) as group:
        while not group.wait(PROBE_SECONDS):
            if gives_up():
                fix = "run the same command again: it continues from what was committed"
                raise StoppedError(
                    f"the run was asked to stop while {most} {request.what} waited for resources", fix=fix
                )
            now = time.monotonic()
            if least < most and now - began >= patience and (count := _largest(request, least, most)):
                say(f"there are free resources for only {count} of {most} {request.what}: the run continues with these")
                return count
            if now - said_at >= SAY_SECONDS:
                say(
                    f"{most} {request.what} wait for free resources, and the present nodes could hold "
                    f"{min(capacity(request), most)}; each requests {request.describe()}"
                )
                said_at = now
    return most


def has_room(request: Resources, count: int) -> bool:
    """Return whether the cluster has free resources for `count` more workers now."""
    with _reserved(request, count) as group:
        return bool(group.wait(PROBE_SECONDS))


@contextmanager
def given_back(request: Resources, count: int) -> Iterator[None]:
    """If the `with` block raises, release the resources that the block has reserved for `count` workers.

    Without this, Ray Train keeps the resources reserved if its workers fail to start.
    """
    before = _groups_of(request, count)
    try:
        yield
    except BaseException:
        for left in _groups_of(request, count) - before:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(left))))
        raise


def _groups_of(request: Resources, count: int) -> set[str]:
    """Return the ids of this program's unnamed placement groups for `count` workers with this request."""
    job, bundles = ray.get_runtime_context().get_job_id(), [request.as_ray] * count
    return {
        i
        for i, group in placement_group_table().items()
        if i.endswith(job)  # a placement group's id ends with the id of its job
        and group["state"] != "REMOVED"
        and not group["name"]
        and list(group["bundles"].values()) == bundles
    }


def _largest(request: Resources, least: int, most: int) -> int | None:
    """Find how many workers, from `least` to `most` - 1, can start now; return None if not even `least` can."""
    low, high = least - 1, min(capacity(request), most - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if has_room(request, middle) else (low, middle - 1)
    return low if low >= least else None


@contextmanager
def _reserved(request: Resources, count: int) -> Iterator[PlacementGroup]:
    group = placement_group(
        [request.as_ray] * count,
        strategy="PACK",
        name=f"dpo-ray-room-{uuid.uuid4().hex}",  # distinguishes it from the workers' own groups, which have no name
        bundle_label_selector=[dict(request.labels) for _ in range(count)],
    )
    try:
        yield group
    finally:
        remove_placement_group(group)
