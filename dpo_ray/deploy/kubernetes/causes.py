"""Why a run waits: the causes that pods, volumes, quotas, webhooks and queues give, each with what to do. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dpo_ray.observe.text import harmless

from .client import Json

GROUP = "ray.io/group"  # KubeRay's label of pods: the name of their group, or `headgroup`
QUEUE = "kueue.x-k8s.io/queue-name"
IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
START_REASONS = ("CreateContainerError", "RunContainerError", "CrashLoopBackOff", "StartError")
MOUNT_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")
LONGEST = 300


class Cause(NamedTuple):
    """Why something waits: whom it concerns, what is wrong, and what to do about it."""

    whom: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.whom}: {self.what}\n  -> {self.fix}"


class Surroundings(NamedTuple):
    """What the API server knows about a run: its RayJob, its Ray cluster, pods, volumes, events, and its place in a queue."""

    run: Json
    cluster: Json | None = None
    pods: tuple[Json, ...] = ()
    claims: tuple[Json, ...] = ()
    events: tuple[Json, ...] = ()
    workloads: tuple[Json, ...] | None = ()
    """The run's Workloads of Kueue; None if they cannot be read."""


def causes(now: Surroundings) -> list[Cause]:
    """List why a run waits, each cause once, with the groups of pods that it concerns."""
    found = [*_run_causes(now), *_queue_causes(now), *_cluster_causes(now)]
    for pod in now.pods:
        found += _pod_causes(pod, now)
    merged: dict[tuple[str, str], list[str]] = {}
    for cause in found:
        merged.setdefault((cause.what, cause.fix), []).append(cause.whom)
    return [Cause(_whom(whom), what, fix) for (what, fix), whom in merged.items()]


def group_of(pod: Json) -> str:
    """Return the name of a pod's group in the recipe's section cluster.kubernetes: head, cpu, engines or training.

    A pod outside of the Ray cluster, which handles files, is of the group `files`.
    """
    group = (pod["metadata"].get("labels") or {}).get(GROUP, "files")
    return "head" if group == "headgroup" else group


def waits(pod: Json) -> bool:
    """Return whether a pod has not started yet."""
    status = pod.get("status") or {}
    return status.get("phase", "Pending") == "Pending" and not pod["metadata"].get("deletionTimestamp")


def claims_of(pod: Json) -> list[str]:
    """Return the names of the PersistentVolumeClaims that a pod mounts."""
    volumes = (pod.get("spec") or {}).get("volumes") or []
    return [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]


def event_time(event: Json) -> str:
    """Return when an event was last seen, as text that can be compared."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((t for t in times if t), event.get("metadata", {}).get("creationTimestamp") or "")


def _run_causes(now: Surroundings) -> Iterator[Cause]:
    status, spec = now.run.get("status") or {}, now.run.get("spec") or {}
    if not status.get("jobDeploymentStatus") and not spec.get("suspend"):
        fix = "check that the operator runs and watches this namespace: kubectl get pods -A -l app.kubernetes.io/name=kuberay"
        yield Cause("RayJob", "the KubeRay operator has not taken it up", fix)
    if not now.pods and (event := _newest(now, "RayJob", now.run["metadata"]["name"])):
        yield _refused_by("RayJob", event.get("message") or "")
    if spec.get("suspend") and QUEUE not in (now.run["metadata"].get("labels") or {}):
        name = now.run["metadata"]["name"]
        patch = '\'{"spec":{"suspend":false}}\''
        fix = f"to continue: kubectl patch rayjob {name} --type merge -p {patch}"
        yield Cause("RayJob", "it is suspended (spec.suspend)", fix)


def _queue_causes(now: Surroundings) -> Iterator[Cause]:
    queue = (now.run["metadata"].get("labels") or {}).get(QUEUE)
    if queue is None or not (now.run.get("spec") or {}).get("suspend"):
        return
    if now.workloads is None:
        fix = "ask for the right to `list` workloads (kueue.x-k8s.io) to see what it waits for"
        yield Cause("queue", f"it waits in the queue {queue}", fix)
        return
    if not now.workloads:
        fix = "check that Kueue is installed, and that its configuration names ray.io/rayjob as an integration"
        yield Cause("queue", f"Kueue has made no Workload of this run for the queue {queue}", fix)
    for workload in now.workloads:
        conditions = {c["type"]: c for c in (workload.get("status") or {}).get("conditions") or []}
        reserved, evicted = conditions.get("QuotaReserved", {}), conditions.get("Evicted", {})
        if evicted.get("status") == "True" and reserved.get("status") != "True":
            fix = "Kueue starts it again when there is room; it then continues from its last checkpoint"
            yield Cause("queue", f"Kueue took its place away: {_words(evicted.get('message'))}", fix)
        if reserved.get("status") != "True":
            fix = f"kubectl describe localqueue {queue} shows what is in use; the ClusterQueue must cover every resource that pods request"
            yield Cause("queue", _words(reserved.get("message")) or f"it waits in the queue {queue}", fix)
        elif conditions.get("Admitted", {}).get("status") != "True":
            checks = (workload.get("status") or {}).get("admissionChecks") or []
            waiting = [
                f"{c.get('name')}: {c.get('message') or c.get('state')}" for c in checks if c.get("state") != "Ready"
            ]
            fix = "kubectl describe workload shows the admission checks"
            yield Cause("queue", f"it has quota, but is not admitted yet: {_words('; '.join(waiting))}", fix)


def _cluster_causes(now: Surroundings) -> Iterator[Cause]:
    if now.cluster is None:
        return
    for condition in (now.cluster.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            yield _refused_by(_who_failed(condition.get("reason") or ""), condition.get("message") or "")
            return
    event = _newest(now, "RayCluster", now.cluster["metadata"]["name"])
    if event and "Failed" in (event.get("reason") or "") and not now.pods:
        yield _refused_by(_who_failed(event["reason"]), event.get("message") or "")


def _refused_by(whom: str, message: str) -> Cause:
    """Return why the API server does not accept an object that the operator wants to create."""
    text = _words(message)
    if quota := re.search(r"exceeded quota: ([^,]+), requested: (.*?), used: (.*?), limited: (.*)", text):
        what = f"the quota `{quota[1]}` is exceeded: requested {quota[2]}, used {quota[3]}, limit {quota[4]}"
        fix = "wait until other work ends, have the quota raised, or make the pods smaller in cluster.kubernetes"
        return Cause(whom, what, fix)
    if "failed quota" in text or "must specify" in text:
        return Cause(whom, text, "the namespace's quota wants requests or limits that the pods do not have")
    if hook := re.search(r'admission webhook "([^"]+)" denied the request:?\s*(.*)', text):
        fix = "correct what it names, or ask who runs this webhook"
        return Cause(whom, f"the admission webhook {hook[1]} refuses it: {hook[2]}", fix)
    if "failed calling webhook" in text:
        return Cause(whom, f"an admission webhook does not answer: {text}", "ask who runs this webhook")
    if "violates PodSecurity" in text:
        return Cause(whom, text, "label the namespace with a Pod Security level that allows what the message names")
    return Cause(whom, text or "the operator cannot create it", "correct what the message names")


def _who_failed(reason: str) -> str:
    return "head" if "HeadPod" in reason else "workers" if "WorkerPod" in reason else "RayCluster"


def _pod_causes(pod: Json, now: Surroundings) -> Iterator[Cause]:
    if not waits(pod):
        return
    group, status = group_of(pod), pod.get("status") or {}
    held = _container_cause(group, status)
    if held is not None:
        yield held
        return
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            yield _unscheduled(group, pod, condition, now)
            return
    event = _newest(now, "Pod", pod["metadata"]["name"], MOUNT_EVENTS)
    if event is not None:
        fix = "check the volume, the Secrets and ConfigMaps that the message names, and the node's network plugin"
        yield Cause(group, f"{event['reason']}: {_words(event.get('message'))}", fix)
        return
    pulling = _newest(now, "Pod", pod["metadata"]["name"], ("Pulling", "Pulled"), warnings=False)
    if pulling is not None and pulling.get("reason") == "Pulling":
        yield Cause(group, _words(pulling.get("message")), "nothing to do: a large image takes minutes on a new node")


def _container_cause(group: str, status: Json) -> Cause | None:
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), _words(waiting.get("message"))
        if reason in IMAGE_REASONS:
            fix = "check cluster.kubernetes.image; a private registry needs image_pull_secrets; on kind, load the image into the nodes"
            return Cause(
                group, f"the image {container.get('image')} cannot be pulled ({_image_reason(message) or reason})", fix
            )
        if reason == "CreateContainerConfigError":
            return Cause(group, message or reason, "create what is missing, or correct cluster.kubernetes.secrets")
        if reason in START_REASONS:
            fix = "check that the image is one of dpo-ray for this kind of node"
            return Cause(group, f"its container does not start ({reason}): {message}", fix)
    return None


def _image_reason(message: str) -> str:
    """Return the part of a message on an image that does not change while Kubernetes tries again."""
    for known in ("not found", "unauthorized", "denied", "no such host", "connection refused", "i/o timeout", "x509"):
        if known in message:
            return known
    return ""


def _unscheduled(group: str, pod: Json, condition: Json, now: Surroundings) -> Cause:
    message = _words((condition.get("message") or "").split(" preemption:")[0])
    field = f"cluster.kubernetes.{group}"
    if condition.get("reason") == "SchedulingGated":
        return Cause(group, "a scheduling gate holds it", "kubectl describe pod shows who set the gate")
    if missing := re.search(r'persistentvolumeclaim "([^"]+)" not found', message):
        fix = "name an existing claim in cluster.kubernetes.storage.claim, or set storage.create_gib"
        return Cause(group, f"the PersistentVolumeClaim {missing[1]} does not exist", fix)
    if "unbound" in message and "PersistentVolumeClaim" in message:
        return _unbound(group, pod, now)
    if lacking := re.findall(r"Insufficient ([\w./-]+?)[,.]?(?:\s|$)", message):
        requests = _requests(pod)
        amounts = ", ".join(f"{requests.get(r, 'some')} {r}" for r in dict.fromkeys(lacking))
        fix = f"wait until other work ends, add a node, or request less ({field})"
        return Cause(group, f"no node has room for {amounts}: {message}", fix)
    if "taint" in message or "affinity" in message or "selector" in message:
        return Cause(group, f"no node is allowed: {message}", f"correct {field}.placement (node_selector, tolerations)")
    return Cause(group, message or "no node has been found", "kubectl describe pod shows what the scheduler tries")


def _unbound(group: str, pod: Json, now: Surroundings) -> Cause:
    bound = {c["metadata"]["name"] for c in now.claims if (c.get("status") or {}).get("phase") == "Bound"}
    name = next((n for n in claims_of(pod) if n not in bound), "?")
    event = _newest(now, "PersistentVolumeClaim", name, warnings=False)
    why = f": {_words(event.get('message'))}" if event else ""
    fix = "choose cluster.kubernetes.storage.storage_class of a provisioner with ReadWriteMany, or have a volume made for the claim"
    return Cause(group, f"the PersistentVolumeClaim {name} has no volume (unbound){why}", fix)


def _requests(pod: Json) -> dict[str, str]:
    containers = (pod.get("spec") or {}).get("containers") or [{}]
    return (containers[0].get("resources") or {}).get("requests") or {}


def _newest(
    now: Surroundings, kind: str, name: str, reasons: tuple[str, ...] = (), *, warnings: bool = True
) -> Json | None:
    """Return the newest event of an object; with `warnings`, the newest one that is a warning."""
    events = [
        e
        for e in now.events
        if (e.get("involvedObject") or {}).get("kind") == kind
        and e["involvedObject"].get("name") == name
        and (not reasons or e.get("reason") in reasons)
        and (not warnings or e.get("type") == "Warning")
    ]
    return max(events, key=event_time, default=None)


def _words(message: str | None) -> str:
    return harmless(" ".join((message or "").split()))[:LONGEST]


def _whom(groups: list[str]) -> str:
    """Return the names of groups, each with the number of its pods: `head, training (8 pods)`."""
    counts = {group: groups.count(group) for group in dict.fromkeys(groups)}
    return ", ".join(group if count == 1 else f"{group} ({count} pods)" for group, count in counts.items())
