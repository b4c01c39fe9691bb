"""The runs of a namespace: their list, stopping one with a checkpoint, and deleting one with everything that was applied."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import NamedTuple

from dpo_ray.errors import InfrastructureError
from dpo_ray.observe.text import duration

from . import driver_log
from .apply import remove
from .causes import causes
from .client import RAY_CLUSTER, RAY_JOB, Cluster, Json, Resource, no_such_run
from .driver_log import HEAD_CONTAINER
from .execute import execute
from .pods import RUN
from .state import RunState, state_of
from .watch import head_of, pods_of, surroundings

STOP_ASKED = (
    "dpo-ray/stop-asked"  # an annotation with the Ray job whose driver was asked: a second signal would kill it
)
ASK_SECONDS = 60.0
POLL_SECONDS = 3.0
COMPANIONS = (
    Resource("v1", "ConfigMap"),
    Resource("v1", "ServiceAccount"),
    Resource("networking.k8s.io/v1", "NetworkPolicy"),
    Resource("monitoring.coreos.com/v1", "PodMonitor"),
)
"""What `apply` creates beside a run. The claim is not among them: deleting a run keeps the results of all runs."""


class ListedRun(NamedTuple):
    """A run as the list shows it; `since` is the time in seconds since its state began, or None."""

    name: str
    state: str
    attempt: int
    since: float | None
    waits: str


def every(cluster: Cluster, namespace: str) -> list[ListedRun]:
    """List the runs of a namespace, the newest first, each with the first reason why it waits.

    Raises:
        InfrastructureError: the API server refuses the request.
        LostSightError: the API server does not answer.
    """
    found = cluster.objects(RAY_JOB, namespace, labels=RUN)
    found.sort(key=lambda run: run["metadata"].get("creationTimestamp") or "", reverse=True)
    return [_listed(cluster, namespace, run) for run in found]


def existing(cluster: Cluster, namespace: str, name: str) -> Json:
    """Return a RayJob.

    Raises:
        ConfigError: there is none of this name.
    """
    run = cluster.get(RAY_JOB, namespace, name)
    if run is None:
        raise no_such_run(namespace, name)
    return run


def stop(
    cluster: Cluster,
    namespace: str,
    name: str,
    grace_seconds: float,
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> None:
    """Stop a run after its driver has written a checkpoint, and delete its RayJob, which frees its pods.

    The driver gets SIGTERM once, however often this is called, and its lines are written until it ends. Before that the
    retries are taken away, as otherwise the operator would start the next attempt.

    Raises:
        ConfigError: there is no RayJob of this name.
        InfrastructureError: the driver cannot be reached, or a request is refused.
    """
    run = existing(cluster, namespace, name)
    state = state_of(run)
    if state.finished:
        say(f"{name}: it is not running: {state}")
        return
    head = head_of(pods_of(cluster, namespace, name, state.cluster) or []) if state.cluster else None
    if head is None or state.job != "RUNNING":
        say(f"{name}: no driver runs, so there is nothing to checkpoint ({state})")
    elif grace_seconds > 0:
        _ask_driver(cluster, namespace, run, state, head)
        say(f"{name}: asked to stop; it ends after its step and a checkpoint (waiting up to {duration(grace_seconds)})")
        if not _wait_for_end(cluster, namespace, name, head, grace_seconds, write):
            say(f"{name}: still running after {duration(grace_seconds)}")
    for line in remove(cluster, RAY_JOB, namespace, name):
        say(line)
    say(f"{name}: stopped; apply the recipe again to continue from what was committed")


def live_log(cluster: Cluster, namespace: str, name: str) -> list[str] | None:
    """Return the lines of the driver that runs or has just ended, or None if no head's pod runs.

    Raises:
        InfrastructureError: the API server refuses to read the log.
    """
    run = cluster.get(RAY_JOB, namespace, name)
    state = state_of(run) if run else None
    if state is None or not state.cluster or not state.job_id:
        return None
    head = head_of(pods_of(cluster, namespace, name, state.cluster) or [])
    if head is None:
        return None
    piece = driver_log.read(cluster, namespace, head, state.job_id, driver_log.Position())
    if piece.problem:
        fix = "it needs the right to `create` and `get` pods/exec; with --attempt N, a small pod reads the storage"
        raise InfrastructureError(f"the log cannot be read: {piece.problem}", where=f"{namespace}/{name}", fix=fix)
    return piece.lines


def delete(cluster: Cluster, namespace: str, name: str) -> Iterator[str]:
    """Delete a run, or a Ray cluster that stays, and the objects beside it, but no claim; yield a line for each.

    Raises:
        ConfigError: there is nothing of this name.
    """
    found = False
    for resource in (RAY_JOB, RAY_CLUSTER):
        for line in remove(cluster, resource, namespace, name):
            found = True
            yield line
    for resource in COMPANIONS:
        for companion in cluster.readable(resource, namespace, labels=f"{RUN}={name}") or []:
            found = True
            yield _delete_companion(cluster, resource, namespace, companion["metadata"]["name"])
    if not found:
        raise no_such_run(namespace, name, "there is no run of this name")


def _delete_companion(cluster: Cluster, resource: Resource, namespace: str, name: str) -> str:
    try:
        cluster.delete(resource, namespace, name)
    except InfrastructureError as error:
        return f"{resource.kind}/{name}: left, because {error.what}"
    return f"{resource.kind}/{name}: deleted"


def _ask_driver(cluster: Cluster, namespace: str, run: Json, state: RunState, head: Json) -> None:
    """Send SIGTERM to the driver in the head's pod, unless that was done before.

    Raises:
        InfrastructureError: the driver is not there, or the API server refuses the command.
    """
    name = run["metadata"]["name"]
    if (run["metadata"].get("annotations") or {}).get(STOP_ASKED) == state.job_id:
        return
    asked = {"metadata": {"annotations": {STOP_ASKED: state.job_id}}, "spec": {"backoffLimit": 0}}
    cluster.change(RAY_JOB, namespace, name, asked)
    command = ["python", "-m", "dpo_ray.deploy.ray_jobs.stop_driver", state.job_id]
    done = execute(cluster, namespace, head["metadata"]["name"], HEAD_CONTAINER, command, seconds=ASK_SECONDS)
    if done.code == 0:
        return
    given_back = {"metadata": {"annotations": {STOP_ASKED: None}}, "spec": {"backoffLimit": state.retries}}
    cluster.change(RAY_JOB, namespace, name, given_back)
    why = (done.errors or done.output.decode(errors="replace")).strip().splitlines()
    what = f"the driver cannot be asked to stop: {why[-1] if why else f'exit code {done.code}'}"
    fix = (
        "this needs the right to `create` and `get` pods/exec; --grace-seconds 0 stops the run without a new checkpoint"
    )
    raise InfrastructureError(what, where=f"{namespace}/{name}", fix=fix)


def _wait_for_end(
    cluster: Cluster, namespace: str, name: str, head: Json, grace_seconds: float, write: Callable[[str], None]
) -> bool:
    """Write the driver's lines until it has ended; return False if it has not within the time."""
    position, until = driver_log.Position(first_byte=-driver_log.LAST_BYTES // 4), time.monotonic() + grace_seconds
    while True:
        run = cluster.get(RAY_JOB, namespace, name)
        state = state_of(run) if run else None
        if run and state and state.job_id:
            piece = driver_log.read(cluster, namespace, head, state.job_id, position)
            position = piece.position
            for line in piece.lines:
                write(line)
        if state is None or state.finished or state.job in ("FAILED", "STOPPED", "SUCCEEDED"):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)


def _listed(cluster: Cluster, namespace: str, run: Json) -> ListedRun:
    state, status = state_of(run), run.get("status") or {}
    began = status.get("endTime") if state.finished else status.get("startTime")
    began = began or run["metadata"].get("creationTimestamp")
    since = time.time() - datetime.fromisoformat(began.replace("Z", "+00:00")).timestamp() if began else None
    words = "is being deleted" if run["metadata"].get("deletionTimestamp") else str(state)
    found = [] if state.finished else causes(surroundings(cluster, namespace, run))
    waits = f"{found[0].whom}: {found[0].what}" if found else ""
    return ListedRun(run["metadata"]["name"], words, state.attempt, since, waits)
