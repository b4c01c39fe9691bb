"""Objects as the API server returns them, with the few fields that dpo-ray reads."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
RUN, CLUSTER = "run", "run-x"


def ray_job(*, suspend: bool = False, queue: str | None = None, retries: int = 3, **status: Any) -> Json:
    labels = {"dpo-ray/run": RUN} | ({"kueue.x-k8s.io/queue-name": queue} if queue else {})
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": RUN, "namespace": "lab", "uid": "u-1", "labels": labels},
        "spec": {"suspend": suspend, "backoffLimit": retries},
        "status": status,
    }


def ray_cluster(*, conditions: Any = (), workers: dict[str, int] | None = None) -> Json:
    groups = [{"groupName": name, "replicas": count} for name, count in (workers or {}).items()]
    fields = ("type", "status", "reason", "message", "lastTransitionTime")
    return {
        "metadata": {"name": CLUSTER},
        "spec": {"workerGroupSpecs": groups},
        "status": {"conditions": [dict(zip(fields, c, strict=False)) for c in conditions]},
    }


def pod(name: str, group: str, *, phase: str = "Running", uid: str = "", node: str = "n1", **metadata: Any) -> Json:
    container = "ray-head" if group == "headgroup" else "ray-worker"
    running = phase == "Running"
    return {
        "metadata": {
            "name": name,
            "uid": uid or name,
            "labels": {"dpo-ray/run": RUN, "ray.io/cluster": CLUSTER, "ray.io/group": group},
            **metadata,
        },
        "spec": {
            "nodeName": node,
            "containers": [{"name": container, "resources": {"limits": {"memory": "8Gi"}, "requests": {}}}],
            "volumes": [],
        },
        "status": {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": "True" if running else "False"}],
            "containerStatuses": [{"name": container, "state": {"running": {}} if running else {}}],
        },
    }


def unscheduled(name: str, group: str, message: str, *, claims: Any = (), requests: Json | None = None) -> Json:
    made = pod(name, group, phase="Pending")
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    made["status"]["conditions"] = [condition]
    made["spec"]["volumes"] = [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in claims]
    made["spec"]["containers"][0]["resources"]["requests"] = requests or {}
    return made


def waiting_container(name: str, group: str, reason: str, message: str, image: str = "dpo-ray") -> Json:
    made = pod(name, group, phase="Pending")
    state = {"waiting": {"reason": reason, "message": message}}
    made["status"]["containerStatuses"] = [{"name": "ray-head", "image": image, "state": state}]
    return made


def ended(name: str, group: str, code: int, reason: str) -> Json:
    made = pod(name, group, phase="Failed")
    state = {"terminated": {"exitCode": code, "reason": reason}}
    made["status"]["containerStatuses"][0]["state"] = state
    return made


def claim(name: str, phase: str) -> Json:
    return {"metadata": {"name": name}, "status": {"phase": phase}}


def event(about: str, name: str, reason: str, message: str, *, kind: str = "Warning", at: int = 0) -> Json:
    return {
        "metadata": {"name": f"{name}.{reason}.{at}"},
        "involvedObject": {"kind": about, "name": name},
        "type": kind,
        "reason": reason,
        "message": message,
        "lastTimestamp": f"2026-01-01T00:00:{at:02d}Z",
    }


def workload(*conditions: tuple[str, str, str, str]) -> Json:
    fields = ("type", "status", "reason", "message")
    return {
        "metadata": {"name": "w", "ownerReferences": [{"uid": "u-1"}]},
        "status": {"conditions": [dict(zip(fields, c, strict=True)) for c in conditions]},
    }
