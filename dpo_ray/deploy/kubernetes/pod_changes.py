"""What happens to the pods of a run: how many of each group run, which one is lost and why, and what takes its place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from dpo_ray.observe.text import harmless

from .causes import event_time, group_of
from .client import Json

EVENTS_OF_A_LOSS = ("TaintManagerEviction", "Evicted", "Preempted", "Preempting", "NodeNotReady", "OOMKilling")
DISRUPTIONS = {
    "PreemptionByScheduler": "preempted for a pod of higher priority",
    "DeletionByTaintManager": "its node does not answer or was drained (taint)",
    "EvictionByEvictionAPI": "evicted, as when its node is drained",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node shut down or evicted it",
}
RAY_CONTAINER = re.compile(
    r"Ray container terminated status: &ContainerStateTerminated\{ExitCode:(\d+),.*?Reason:(\w*),"
)


@dataclass
class PodsSeen:
    """The pods that ran when a watcher looked last, and the losses whose replacement it waits for."""

    running: dict[str, Json] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    counts: str = ""


def is_running(pod: Json) -> bool:
    """Return whether a pod's Ray container runs and is ready, and the pod is not about to be deleted."""
    status = pod.get("status") or {}
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or [])
    return status.get("phase") == "Running" and ready and not pod["metadata"].get("deletionTimestamp")


def changes(seen: PodsSeen, pods: list[Json], events: list[Json], cluster: Json | None) -> Iterator[str]:
    """Yield a line for each pod that was lost or regained since the last look, then how many run; update `seen`.

    `events` are those of lost pods and of the Ray cluster. Pods that were idle leave without being called lost.
    """
    present = {pod["metadata"]["name"]: pod for pod in pods}
    running = {name: pod for name, pod in present.items() if is_running(pod)}
    for name, before in seen.running.items():
        if name in running:
            continue
        group = group_of(before)
        why = loss(present.get(name, before), events)
        if why == "":
            yield f"{group}: pod {name} was idle and leaves"
            continue
        seen.lost[group] += 1
        node = (before.get("spec") or {}).get("nodeName") or "?"
        yield f"{group}: lost pod {name} on node {node}: {why}"
    for name, pod in running.items():
        group = group_of(pod)
        if name not in seen.running and seen.lost[group] > 0:
            seen.lost[group] -= 1
            yield f"{group}: regained, as pod {name} on node {(pod.get('spec') or {}).get('nodeName') or '?'}"
    seen.running = running
    counts = _counts(running, present, cluster)
    if counts != seen.counts:
        seen.counts = counts
        if counts:
            yield f"pods that run: {counts}"


def loss(pod: Json, events: list[Json]) -> str:
    """Return why a pod no longer runs; "" if the autoscaler removed it because it was idle."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            return DISRUPTIONS.get(
                condition.get("reason", ""), _words(condition.get("message") or condition.get("reason"))
            )
    for container in status.get("containerStatuses") or []:
        state = container.get("state") or {}
        ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated")
        if ended and not pod["metadata"].get("deletionTimestamp"):
            return _container_end(
                pod, container.get("name", ""), int(ended.get("exitCode") or 0), ended.get("reason", "")
            )
    if status.get("reason"):
        return _words(f"{status['reason']}: {status.get('message') or ''}").rstrip(": ")
    told = sorted((e for e in events if _concerns(e, name)), key=event_time)
    for event in reversed(told):
        message = event.get("message") or ""
        if event.get("reason") in EVENTS_OF_A_LOSS:
            return _words(f"{event['reason']}: {message}")
        if event.get("reason") in ("DeletedWorkerPod", "DeletedHeadPod"):
            if ended := RAY_CONTAINER.search(message):
                return _container_end(pod, "", int(ended[1]), ended[2])
            if message.startswith("Deleted pod "):  # KubeRay's words for a pod that the autoscaler gives back
                return ""
    if pod["metadata"].get("deletionTimestamp") or status.get("phase") != "Running":
        return "deleted"
    if any(c.get("type") == "Ready" and c.get("status") != "True" for c in status.get("conditions") or []):
        return "not ready: its node or its Ray process does not answer"
    return "deleted"


def gone(seen: PodsSeen, pods: list[Json]) -> list[str]:
    """Return the names of the pods that ran at the last look and do not run now."""
    running = {pod["metadata"]["name"] for pod in pods if is_running(pod)}
    return [name for name in seen.running if name not in running]


def _container_end(pod: Json, container: str, code: int, reason: str) -> str:
    if reason == "OOMKilled":
        containers = (pod.get("spec") or {}).get("containers") or [{}]
        limits = next((c for c in containers if c.get("name") == container), containers[0]).get("resources") or {}
        limit = (limits.get("limits") or {}).get("memory", "?")
        at = f" of {container}" if container == "autoscaler" else ""
        return f"OOMKilled: its memory{at} reached the limit of {limit}; raise cluster.kubernetes.{group_of(pod)}.memory_gib"
    what = "killed" if code in (137, 9) else f"its container ended with exit code {code}"
    return f"{what} ({reason})" if reason and reason not in ("Error", "Completed") else what


def _concerns(event: Json, name: str) -> bool:
    about = event.get("involvedObject") or {}
    return about.get("name") == name or bool(re.search(rf"/{re.escape(name)}(?![-\w.])", event.get("message") or ""))


def _counts(running: dict[str, Json], present: dict[str, Json], cluster: Json | None) -> str:
    """Return how many pods of each group run, of those that are wanted: `head 1/1, training 1/2`."""
    wanted = Counter(group_of(p) for p in present.values() if not p["metadata"].get("deletionTimestamp"))
    spec = (cluster or {}).get("spec") or {}
    for group in spec.get("workerGroupSpecs") or []:
        wanted[group["groupName"]] = max(wanted[group["groupName"]], group.get("replicas") or 0)
    if cluster is not None:
        wanted["head"] = max(wanted["head"], 1)
    ready = Counter(group_of(p) for p in running.values())
    return ", ".join(f"{group} {ready[group]}/{count}" for group, count in wanted.items() if count)


def _words(message: str | None) -> str:
    return harmless(" ".join((message or "").split()))[:300]
