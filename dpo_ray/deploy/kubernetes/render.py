"""The KubeRay manifests of a recipe: a RayJob or a RayCluster, and all other Kubernetes objects that it needs.

A RayJob runs the recipe. A recipe is submitted to a RayCluster with `dpo-ray submit`.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from typing import Any, Literal

import yaml

from dpo_ray import __version__
from dpo_ray.cluster.node_groups import ROLE
from dpo_ray.config.cluster import MAX_RAYJOB_NAME, QueueConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError
from dpo_ray.run.job import METADATA

from .groups import PodGroup, groups
from .network import egress_ports
from .pods import RUN, Json, autoscaler_options, by_kueue, head_template, worker_template
from .recipe import RECIPE_DIRECTORY, RECIPE_FILE, config_map_files, output_on_cluster
from .rules import ELASTIC_JOB

RAY_VERSION = "2.60.0"
DASHBOARD_PORT, METRICS_PORT, DNS_PORT = 8265, 8080, 53

Kind = Literal["RayJob", "RayCluster"]


def render(recipe: Recipe, kind: Kind = "RayJob") -> list[Json]:
    """Build the manifests in the order in which they must be applied. The last one is the RayJob or RayCluster.

    Raises:
        ConfigError: the recipe cannot run on Kubernetes because of a name, a path, a secret or a size.
    """
    name, profile = run_name(recipe), recipe.cluster.kubernetes
    manifests = [
        *([_service_account(name)] if profile.service_account is None else []),
        _config_map(recipe, name),
        *([_claim(recipe)] if profile.storage is not None and profile.storage.create_gib is not None else []),
        *([_network_policy(recipe, name)] if profile.network.policy else []),
        *([_pod_monitor(name)] if profile.pod_monitor else []),
        _ray_object(recipe, name, kind),
    ]
    for manifest in manifests:
        manifest["metadata"]["namespace"] = profile.namespace
    return manifests


def text(manifests: list[Json]) -> str:
    """Return manifests as text: YAML documents that are separated by `---`."""
    return "---\n".join(yaml.dump(m, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120) for m in manifests)


def run_name(recipe: Recipe) -> str:
    """Return the name of the run's Kubernetes objects.

    Raises:
        ConfigError: cluster.kubernetes.name is not set, and the recipe's name is not valid in Kubernetes.
    """
    name = recipe.cluster.kubernetes.name or recipe.name.replace("_", "-")
    if len(name) > MAX_RAYJOB_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"`{name}` is not a valid name of a RayJob: a letter, then letters, digits and -, at most {MAX_RAYJOB_NAME} characters",
            where="cluster.kubernetes.name",
            fix="set this field; the run itself keeps the name of the recipe",
        )
    return name


def _ray_object(recipe: Recipe, name: str, kind: Kind) -> Json:
    queue = recipe.cluster.kubernetes.queue
    job = kind == "RayJob"
    return {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": _labels(name) | _queue_labels(name, queue), **_elastic(recipe)},
        "spec": _job_spec(recipe, name) if job else _cluster_spec(recipe, name) | _suspended(queue),
    }


def _job_spec(recipe: Recipe, name: str) -> Json:
    profile = recipe.cluster.kubernetes
    spec: Json = {
        # The operator posts the job to the dashboard, without a second pod whose connection may break.
        "submissionMode": "HTTPMode",
        "entrypoint": f"dpo-ray run {RECIPE_DIRECTORY}/{RECIPE_FILE}",
        "metadata": _metadata(recipe, name),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": profile.ttl_seconds,
        "backoffLimit": profile.retries,
    }
    if profile.deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = profile.deadline_seconds
    if profile.start_deadline_seconds is not None:
        spec["preRunningDeadlineSeconds"] = profile.start_deadline_seconds
    spec |= _suspended(profile.queue)
    spec["rayClusterSpec"] = _cluster_spec(recipe, name)
    return spec


def _metadata(recipe: Recipe, name: str) -> dict[str, str]:
    """Return the metadata of the Ray job, from which the driver and `dpo-ray list` know which run it is."""
    profile = recipe.cluster.kubernetes
    values = json.dumps(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    about = {
        "recipe": recipe.name,
        "output": output_on_cluster(recipe),
        "version": __version__,
        "recipe_sha256": hashlib.sha256(values.encode()).hexdigest(),
        "rayjob": f"{profile.namespace}/{name}",
        "retries": str(profile.retries),
    }
    return {f"{METADATA}{key}": value for key, value in about.items()}


def stamped(manifests: list[Json]) -> list[Json]:
    """Mark a RayJob as newly applied, because its pods cannot read its uid; return the manifests.

    The driver then knows whether an earlier attempt was one of the same RayJob, or of a former one with the same name.
    """
    for manifest in manifests:
        if manifest["kind"] == "RayJob":
            manifest["spec"]["metadata"][f"{METADATA}applied"] = uuid.uuid4().hex
    return manifests


def _suspended(queue: QueueConfig | None) -> Json:
    """Return the field that suspends an object until Kueue admits it; return {} without Kueue."""
    return {"suspend": True} if queue is not None and queue.type == "kueue" else {}


def _cluster_spec(recipe: Recipe, name: str) -> Json:
    profile = recipe.cluster.kubernetes
    spec: Json = {"rayVersion": RAY_VERSION, "authOptions": {"mode": "token"}}
    if profile.autoscaling:
        spec |= {"enableInTreeAutoscaling": True, "autoscalerOptions": autoscaler_options(profile)}
    spec["headGroupSpec"] = {
        # The head has no CPUs in Ray, so that no task runs next to the driver.
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104 - the NetworkPolicy closes it
        "labels": {ROLE: "head"},
        "template": head_template(recipe, name),
    }
    spec["workerGroupSpecs"] = [_worker_group(recipe, name, group) for group in groups(recipe)]
    return spec


def _worker_group(recipe: Recipe, name: str, group: PodGroup) -> Json:
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.min_replicas,
        "maxReplicas": group.max_replicas,
        "rayStartParams": {},
        "labels": group.labels,
        "template": worker_template(recipe, name, group),
    }


def _labels(name: str) -> dict[str, str]:
    return {RUN: name, "app.kubernetes.io/part-of": "dpo-ray"}


def _queue_labels(name: str, queue: QueueConfig | None) -> dict[str, str]:
    if queue is None:
        return {}
    if queue.type == "kueue":
        priority = {"kueue.x-k8s.io/priority-class": queue.priority_class} if queue.priority_class else {}
        return {"kueue.x-k8s.io/queue-name": queue.name} | priority
    priority = {"ray.io/priority-class-name": queue.priority_class} if queue.priority_class else {}
    if queue.type == "volcano":
        return {"volcano.sh/queue-name": queue.name} | priority
    return {
        "yunikorn.apache.org/app-id": name,
        "yunikorn.apache.org/queue": queue.name,
        "ray.io/gang-scheduling-enabled": "true",
    } | priority


def _elastic(recipe: Recipe) -> Json:
    """Return the annotation with which Kueue admits more pods of a run while it runs; return {} if it needs none."""
    profile = recipe.cluster.kubernetes
    if not (by_kueue(profile) and profile.autoscaling):
        return {}
    return {"annotations": {ELASTIC_JOB: "true"}}


def _service_account(name: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name, "labels": _labels(name)},
        "automountServiceAccountToken": False,
    }


def _config_map(recipe: Recipe, name: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe", "labels": _labels(name)},
        "data": config_map_files(recipe),
    }


def _claim(recipe: Recipe) -> Json:
    storage = recipe.cluster.kubernetes.storage
    assert storage is not None  # noqa: S101 - the caller's condition
    spec: Json = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{storage.create_gib}Gi"}},
    }
    if storage.storage_class is not None:
        spec["storageClassName"] = storage.storage_class
    # Runs share the claim, so it has no label of a run: deleting a run by its label must not delete all results.
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": storage.claim, "labels": {"app.kubernetes.io/part-of": "dpo-ray"}},
        "spec": spec,
    }


def _network_policy(recipe: Recipe, name: str) -> Json:
    network = recipe.cluster.kubernetes.network
    run = {"podSelector": {"matchLabels": {RUN: name}}}
    ports = egress_ports(recipe)
    dns = [{"protocol": protocol, "port": DNS_PORT} for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "podSelector": {"matchLabels": {RUN: name}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [run]},
                {"from": [_namespace(network.operator_namespace)], "ports": [_tcp(DASHBOARD_PORT)]},
                {"from": [_namespace(network.monitoring_namespace)], "ports": [_tcp(METRICS_PORT)]},
            ],
            "egress": [{"to": [run]}, {"ports": dns}, *([{"ports": [_tcp(port) for port in ports]}] if ports else [])],
        },
    }


def _namespace(name: str) -> Json:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(port: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": port}


def _pod_monitor(name: str) -> Json:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "selector": {"matchLabels": {RUN: name}},
            "podMetricsEndpoints": [{"port": "metrics"}],
            "podTargetLabels": [RUN, ROLE, "ray.io/cluster", "ray.io/node-type"],
        },
    }


class _Dumper(yaml.SafeDumper):
    """A YAML writer for people: lists are indented, texts of several lines are blocks, and there are no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _block(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _block)
