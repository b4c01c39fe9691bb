"""Pod templates for the head and the workers. They are allowed even if the namespace's Pod Security is `restricted`."""

from __future__ import annotations

from typing import Any

from dpo_ray import __version__
from dpo_ray.cluster.node_groups import ROLE, VARIABLE, as_text
from dpo_ray.config.cluster import KubernetesConfig, PlacementConfig
from dpo_ray.config.recipe import Recipe

from .groups import PodGroup, groups, node_groups
from .recipe import RECIPE_DIRECTORY

Json = dict[str, Any]

RUN = "dpo-ray/run"  # a label of every object that belongs to a run
USER = 1000  # the user id in the image
STOP_SECONDS = 600  # a stopped driver first commits a checkpoint; the default of Ray is 3
GRACE_SECONDS = 30  # Ray's own processes end at once, and with the head's the driver
TRAINING_GRACE_SECONDS = 120  # in which training writes a checkpoint
# As the first process of its container, the autoscaler would ignore SIGTERM, and the pod would end only after its grace.
AUTOSCALER = 'trap "kill %1" TERM INT; $KUBERAY_GEN_AUTOSCALER_START_CMD & wait %1'
TOKEN_DIRECTORY = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - where the API's clients look
LOST_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
SCRATCH = {"name": "scratch", "mountPath": "/tmp"}  # noqa: S108 - Ray's logs and spilled objects are there

POD_SECURITY: Json = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
# Ray's own check of a node. The operator's default waits 10 s and looks every 5 s, and it starts no driver before every pod
# is ready. A pod counts as lost after 50 s without an answer, as by default.
READINESS: Json = {
    "httpGet": {"path": "/api/healthz", "port": 52365},
    "initialDelaySeconds": 1,
    "periodSeconds": 2,
    "timeoutSeconds": 5,
    "failureThreshold": 25,
}
CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def image(recipe: Recipe) -> str:
    """Return the container image of every pod: the one in the recipe, or the default image for GPUs or CPUs."""
    kind = "gpu" if any(group.gpus for group in groups(recipe)) else "cpu"
    return recipe.cluster.kubernetes.image or f"dpo-ray:{__version__}-{kind}"


def head_template(recipe: Recipe, name: str) -> Json:
    """Build the pod template of Ray's head. The driver runs there, so the recipe is mounted in this pod."""
    profile = recipe.cluster.kubernetes
    head = profile.head
    container = _container(recipe, "ray-head", head.cpus, head.memory_gib)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
        {"name": "metrics", "containerPort": 8080},
    ]
    container["env"].append({"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(STOP_SECONDS)})
    container["env"].append({"name": VARIABLE, "value": as_text(node_groups(recipe))})
    container["volumeMounts"].append({"name": "recipe", "mountPath": RECIPE_DIRECTORY, "readOnly": True})
    spec = _spec(profile, name, "head", container, head.placement, head.memory_gib)
    spec["volumes"].append({"name": "recipe", "configMap": {"name": f"{name}-recipe"}})
    if profile.autoscaling:
        spec["volumes"].append(_autoscaler_token())
    return _template(profile, name, "head", spec, head.placement)


def worker_template(recipe: Recipe, name: str, group: PodGroup) -> Json:
    """Build the template of the worker pods in one group."""
    profile = recipe.cluster.kubernetes
    container = _container(recipe, "ray-worker", group.cpus, group.memory_gib)
    container["ports"] = [{"name": "metrics", "containerPort": 8080}]
    devices = dict(group.devices)
    if group.gpus:
        devices[profile.gpu_resource] = group.gpus
    for part in container["resources"].values():
        part |= {device: str(count) for device, count in devices.items()}
    spec = _spec(profile, name, group.labels[ROLE], container, group.placement, group.memory_gib)
    if group.name == "training":
        spec["terminationGracePeriodSeconds"] = TRAINING_GRACE_SECONDS
    spec["tolerations"] = [*spec.get("tolerations", ()), *_lost_node(profile, group.placement)]
    return _template(profile, name, group.labels[ROLE], spec, group.placement)


def autoscaler_options(profile: KubernetesConfig) -> Json:
    """Return the options of the autoscaler's container, which adds and removes pods.

    It is the only container that gets a token for the API server.
    """
    resources = {"cpu": "500m", "memory": "1Gi"}
    return {
        "version": "v2",
        "idleTimeoutSeconds": profile.idle_seconds,
        "upscalingMode": "Default",
        "args": [AUTOSCALER],
        "resources": {"limits": resources, "requests": dict(resources)},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            dict(SCRATCH),
            {"name": "autoscaler-token", "mountPath": TOKEN_DIRECTORY, "readOnly": True},
        ],
    }


def _container(recipe: Recipe, name: str, cpus: int, memory_gib: int) -> Json:
    profile = recipe.cluster.kubernetes
    plain = {
        "HOME": "/tmp/home",  # noqa: S108 - the root file system is read-only
        "HF_HOME": f"{profile.storage.mount}/hugging-face" if profile.storage else "/tmp/hugging-face",  # noqa: S108
        "PYTHONUNBUFFERED": "1",
        **profile.environment,
    }
    secrets = [
        {"name": s.variable, "valueFrom": {"secretKeyRef": {"name": s.secret, "key": s.key}}} for s in profile.secrets
    ]
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if profile.reserve_scratch:  # a limit alone would be a request as well, for which few queues have a quota
        amounts["ephemeral-storage"] = f"{profile.scratch_gib}Gi"
    mounts: list[Json] = [dict(SCRATCH), {"name": "shared-memory", "mountPath": "/dev/shm"}]  # noqa: S108
    if profile.storage is not None:
        mounts.append({"name": "storage", "mountPath": profile.storage.mount})
    return {
        "name": name,
        "image": image(recipe),
        "imagePullPolicy": "IfNotPresent",
        "env": [*({"name": key, "value": value} for key, value in plain.items()), *secrets],
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "readinessProbe": READINESS,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }


def _spec(
    profile: KubernetesConfig, name: str, role: str, container: Json, placement: PlacementConfig, memory_gib: int
) -> Json:
    volumes: list[Json] = [
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{profile.scratch_gib}Gi"}},
        # Ray's object store is in it. It counts towards the memory of the container.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, memory_gib // 2)}Gi"}},
    ]
    if profile.storage is not None:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": profile.storage.claim}})
    spec: Json = {
        "restartPolicy": "Never",
        "serviceAccountName": profile.service_account or name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": volumes,
    }
    if profile.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in profile.image_pull_secrets]
    if placement.node_selector:
        spec["nodeSelector"] = dict(placement.node_selector)
    if placement.tolerations:
        spec["tolerations"] = [t.model_dump(exclude_none=True) for t in placement.tolerations]
    if placement.topology_key is not None and not by_kueue(profile):
        term = {"topologyKey": placement.topology_key, "labelSelector": {"matchLabels": {RUN: name, ROLE: role}}}
        spec["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return spec


def _lost_node(profile: KubernetesConfig, placement: PlacementConfig) -> list[Json]:
    """Return the tolerations after whose time Kubernetes replaces a pod of a lost node, except those that are set."""
    own = {toleration.key for toleration in placement.tolerations}
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": profile.lost_node_seconds}
        for key in LOST_NODE_TAINTS
        if key not in own
    ]


def _template(profile: KubernetesConfig, name: str, role: str, spec: Json, placement: PlacementConfig) -> Json:
    metadata: Json = {"labels": {RUN: name, ROLE: role}}
    if placement.topology_key is not None and by_kueue(profile):
        metadata["annotations"] = {"kueue.x-k8s.io/podset-required-topology": placement.topology_key}
    return {"metadata": metadata, "spec": spec}


def by_kueue(profile: KubernetesConfig) -> bool:
    return profile.queue is not None and profile.queue.type == "kueue"


def _autoscaler_token() -> Json:
    """Build a volume with the service account's token, which only the container of the autoscaler mounts.

    By default, the kubelet would mount the token into every container.
    """
    return {
        "name": "autoscaler-token",
        "projected": {
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {
                    "downwardAPI": {
                        "items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}],
                    }
                },
            ]
        },
    }
