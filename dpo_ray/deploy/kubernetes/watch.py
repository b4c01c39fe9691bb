"""Following a run until it has ended: why it waits, what its driver writes, which pods are lost, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dpo_ray.errors import ConfigError, InfrastructureError, StoppedError
from dpo_ray.observe.text import duration

from . import driver_log, pod_changes
from .causes import QUEUE, Cause, Surroundings, causes, claims_of, group_of, waits
from .client import CLAIM, EVENT, POD, RAY_CLUSTER, RAY_JOB, WORKLOADS, Cluster, Json, no_such_run
from .pods import RUN
from .state import RunState, failure_of, state_of

POLL_SECONDS = 3.0  # proxies would close a connection that stays open, and so the server is asked again and again
HEAD_LOST_SECONDS = 600.0
REMINDER_SECONDS = 300.0
PODS_ASKED_ABOUT = 5  # in one look, so that a thousand pods that wait cost no thousand requests
RELEASING = ("Suspending", "Suspended", "Retrying")  # the operator deletes all pods, and none of them is lost


@dataclass
class Seen:
    """What a watcher has told so far, so that it tells everything once."""

    uid: str = ""
    state: str = ""
    causes: list[Cause] = field(default_factory=list)
    candidates: list[Cause] = field(default_factory=list)
    told_at: float = 0.0
    waiting_since: float | None = None
    pods: pod_changes.PodsSeen = field(default_factory=pod_changes.PodsSeen)
    log: driver_log.Position = field(default_factory=driver_log.Position)
    log_problem: str = ""
    had_head: bool = False
    head_gone_since: float | None = None
    blind: bool = False
    """The pods cannot be read."""


def watch(
    cluster: Cluster,
    namespace: str,
    name: str,
    say: Callable[[str], None],
    write: Callable[[str], None],
    *,
    from_start: bool = False,
    head_lost_seconds: float = HEAD_LOST_SECONDS,
    poll_seconds: float = POLL_SECONDS,
) -> RunState:
    """Follow a RayJob until it has finished, and return its last state.

    Args:
        say: Receives what happens to the run, a line at a time.
        write: Receives the lines of its driver.
        from_start: Write the driver's lines from the first one; otherwise the last few and those that come.
        head_lost_seconds: How long a head that was lost may be away.

    Raises:
        ConfigError: there is no RayJob of this name.
        StoppedError: the RayJob was deleted before it had finished.
        InfrastructureError: the head was lost and does not come back, or the API server refuses a request.
        LostSightError: the API server does not answer.
    """
    seen = Seen(log=driver_log.Position(first_byte=0 if from_start else -driver_log.LAST_BYTES))
    while True:
        run = cluster.get(RAY_JOB, namespace, name)
        if run is None:
            raise _absent(namespace, name, seen)
        if seen.uid and seen.uid != run["metadata"].get("uid"):
            say("a new RayJob of this name has taken the place of the earlier one")
            seen = Seen()
        seen.uid = run["metadata"].get("uid") or "?"
        state = state_of(run)
        was_blind = seen.blind
        now = _surroundings(cluster, namespace, run, state, seen)
        if seen.blind and not was_blind:
            say("the pods cannot be read, only the run's state; it needs the right to `list` pods")
        _write_log(cluster, namespace, now, state, seen, say, write)
        _tell_state(state, seen, say)
        if state.finished:
            return state
        _tell_pods(now, state, seen, say)
        _tell_causes(now, seen, say, poll_seconds)
        _check_head(now, state, seen, say, f"{namespace}/{name}", head_lost_seconds)
        time.sleep(poll_seconds)


def head_of(pods: list[Json] | tuple[Json, ...]) -> Json | None:
    """Return the pod of Ray's head if its container runs, or None."""
    for pod in pods:
        containers = (pod.get("status") or {}).get("containerStatuses") or []
        mine = [c for c in containers if c.get("name") == driver_log.HEAD_CONTAINER]
        if group_of(pod) == "head" and any("running" in (c.get("state") or {}) for c in mine):
            return pod
    return None


def pods_of(cluster: Cluster, namespace: str, name: str, ray_cluster: str = "") -> list[Json] | None:
    """Return the pods of a run, or None if they cannot be read; with `ray_cluster`, only those of this one attempt."""
    labels = f"{RUN}={name}" + (f",ray.io/cluster={ray_cluster}" if ray_cluster else "")
    return cluster.readable(POD, namespace, labels=labels)


def surroundings(cluster: Cluster, namespace: str, run: Json) -> Surroundings:
    """Read everything that shows why a run waits."""
    return _surroundings(cluster, namespace, run, state_of(run), Seen())


def _surroundings(cluster: Cluster, namespace: str, run: Json, state: RunState, seen: Seen) -> Surroundings:
    name, ray_cluster, pods = run["metadata"]["name"], None, []
    if state.cluster:
        ray_cluster = cluster.get(RAY_CLUSTER, namespace, state.cluster)
        listed = pods_of(cluster, namespace, name, state.cluster)
        pods, seen.blind = listed or [], listed is None
    waiting = [pod for pod in pods if waits(pod)][:PODS_ASKED_ABOUT]
    gone = pod_changes.gone(seen.pods, pods)[:PODS_ASKED_ABOUT]
    claims = sorted({claim for pod in waiting for claim in claims_of(pod)})
    asked = [pod["metadata"]["name"] for pod in waiting] + gone + claims
    if waiting or gone or not pods:
        asked += [name, state.cluster] if state.cluster else [name]
    events: list[Json] = []
    for each in asked:
        events += cluster.readable(EVENT, namespace, fields=f"involvedObject.name={each}") or []
    volumes: list[Json] = []
    for claim in claims:
        volumes += cluster.readable(CLAIM, namespace, fields=f"metadata.name={claim}") or []
    workloads: list[Json] | None = []
    if QUEUE in (run["metadata"].get("labels") or {}) and (run.get("spec") or {}).get("suspend"):
        workloads = _workloads(cluster, namespace, run["metadata"].get("uid"))
    return Surroundings(
        run, ray_cluster, tuple(pods), tuple(volumes), tuple(events), None if workloads is None else tuple(workloads)
    )


def _workloads(cluster: Cluster, namespace: str, uid: str | None) -> list[Json] | None:
    """Return Kueue's Workloads of a RayJob, or None if they cannot be read."""
    listed = next((w for kind in WORKLOADS if (w := cluster.readable(kind, namespace)) is not None), None)
    if listed is None:
        return None
    return [w for w in listed if any(o.get("uid") == uid for o in w["metadata"].get("ownerReferences") or [])]


def _absent(namespace: str, name: str, seen: Seen) -> ConfigError | StoppedError:
    if seen.uid:
        fix = "apply the recipe again: the run continues from what was committed"
        what = "the RayJob was deleted before it had finished"
        return StoppedError(what, where=f"{namespace}/{name}", fix=fix)
    return no_such_run(namespace, name)


def _write_log(
    cluster: Cluster,
    namespace: str,
    now: Surroundings,
    state: RunState,
    seen: Seen,
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> None:
    head = head_of(now.pods)
    if head is None or not state.job_id:
        return
    piece = driver_log.read(cluster, namespace, head, state.job_id, seen.log)
    for line in piece.lines:
        write(line)
    seen.log = piece.position
    refused = "403" in piece.problem and piece.problem != seen.log_problem
    if refused:
        say(f"the driver's log cannot be read ({piece.problem}); it needs the right to `create` and `get` pods/exec")
    seen.log_problem = piece.problem


def _tell_state(state: RunState, seen: Seen, say: Callable[[str], None]) -> None:
    if str(state) == seen.state:
        return
    seen.state = str(state)
    say(seen.state)
    if state.deployment == "Retrying":
        for line in failure_of(state):
            say(f"  {line}")


def _tell_pods(now: Surroundings, state: RunState, seen: Seen, say: Callable[[str], None]) -> None:
    if seen.blind or state.deployment in RELEASING or now.run["metadata"].get("deletionTimestamp"):
        seen.pods = pod_changes.PodsSeen()
        return
    for line in pod_changes.changes(seen.pods, list(now.pods), list(now.events), now.cluster):
        say(line)


def _tell_causes(now: Surroundings, seen: Seen, say: Callable[[str], None], poll_seconds: float) -> None:
    """Report why the run waits. A cause is reported when it is seen twice, because many pass while pods start."""
    found = causes(now)
    lasting = [cause for cause in found if cause in seen.candidates]
    seen.candidates = found
    clock = time.monotonic()
    if not found:
        seen.causes, seen.waiting_since = [], None
        return
    seen.waiting_since = clock if seen.waiting_since is None else seen.waiting_since
    again = bool(seen.causes) and clock - seen.told_at >= REMINDER_SECONDS
    for cause in lasting:
        if cause not in seen.causes or again:
            say(f"waits{f', for {duration(clock - seen.waiting_since)} now' if again else ''}: {cause}")
            seen.told_at = clock
    seen.causes = [cause for cause in [*seen.causes, *lasting] if cause in found]


def _check_head(
    now: Surroundings, state: RunState, seen: Seen, say: Callable[[str], None], where: str, limit_seconds: float
) -> None:
    """Report since when a head that ran is gone. The operator would leave the RayJob in the state Running for ever.

    Raises:
        InfrastructureError: it has been gone for longer than the limit.
    """
    present = any(group_of(pod) == "head" and pod_changes.is_running(pod) for pod in now.pods)
    seen.had_head = (seen.had_head or present or state.job == "RUNNING") and state.deployment == "Running"
    if present or not seen.had_head or seen.blind:
        if seen.head_gone_since is not None and present:
            say(f"the head is back after {duration(time.monotonic() - seen.head_gone_since)}; the driver starts again")
        seen.head_gone_since = None
        return
    clock = time.monotonic()
    if seen.head_gone_since is None:
        seen.head_gone_since = clock
        since = _head_gone_at(now.cluster)
        say(f"the head, and the driver with it, is gone{since}; waiting for it for up to {duration(limit_seconds)}")
    away = clock - seen.head_gone_since
    if away > limit_seconds:
        why = "; ".join(f"{cause.whom}: {cause.what}" for cause in seen.causes) or "no reason is known"
        fix = "remove the cause, or `dpo-ray kubernetes apply RECIPE --replace`: the run continues from what was committed"
        what = f"the head has been gone for {duration(away)}, and the RayJob would wait for it for ever ({why})"
        raise InfrastructureError(what, where=where, fix=fix)


def _head_gone_at(ray_cluster: Json | None) -> str:
    """Return since when the operator has seen no head that is ready, as words, or ""."""
    for condition in ((ray_cluster or {}).get("status") or {}).get("conditions") or []:
        if condition.get("type") == "HeadPodReady" and condition.get("status") != "True":
            return f" since {condition.get('lastTransitionTime') or '?'}"
    return ""
