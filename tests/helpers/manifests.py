"""Recipes on Kubernetes, made in memory, and a sound RayJob that is none of the renderer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpo_ray.config.load import load_recipe
from dpo_ray.config.recipe import Recipe

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"

ON_GPUS = (".training={gpus: 8, cpus: 64, memory_gib: 900}", ".engines={gpus: 8, cpus: 64, memory_gib: 900}")
TOLERATION = "{key: nvidia.com/gpu, effect: NoSchedule}"
SECRET = "{variable: HF_TOKEN, secret: hugging-face, key: token}"

OPTIONS: dict[str, tuple[str, ...]] = {
    "an image of a registry": (".image=registry.example.org/dpo-ray:0.1.0", ".image_pull_secrets=[registry]"),
    "a namespace": (".namespace=research", ".name=first-run"),
    "Kueue": (".queue={type: kueue, name: research}", ".autoscaling=false"),
    "Kueue with elastic engines": (".queue={type: kueue, name: research}", ".engines={max_replicas: 8}"),
    "Kueue with a priority": (".queue={type: kueue, name: research, priority_class: high}", ".autoscaling=false"),
    "Kueue with a topology": (
        ".queue={type: kueue, name: research}",
        ".autoscaling=false",
        ".training.placement={topology_key: cloud.google.com/gce-topology-block}",
    ),
    "Volcano": (".queue={type: volcano, name: research, priority_class: high}",),
    "YuniKorn": (".queue={type: yunikorn, name: root.research}",),
    "no autoscaling": (".autoscaling=false",),
    "bounds of autoscaling": (".cpu={replicas: 2, min_replicas: 1, max_replicas: 32}", ".idle_seconds=60"),
    "engines on the training pods": (".engines=null",),
    "engines of another label": ("cluster.roles.reference.node_labels={accelerator: l40s}",),
    "a volume that is made": (".storage={create_gib: 500, storage_class: filestore}",),
    "a volume elsewhere": (".storage={claim: results, mount: /data}",),
    "an object store": (".storage=null", "output=s3://bucket/runs", ".service_account=bucket-reader"),
    "a store of its own": (".storage=null", "output=gs://bucket/runs", "reference.store=gs://bucket/store"),
    "secrets": (f".secrets=[{SECRET}]",),
    "an environment": (".environment={NCCL_SOCKET_IFNAME: eth0, NCCL_DEBUG: WARN}",),
    "node selectors": (".training.placement={node_selector: {pool: train}, tolerations: [" + TOLERATION + "]}",),
    "a topology": (".training.placement={topology_key: topology.kubernetes.io/zone}",),
    "RDMA": (".training={devices: {rdma/ib: 8}}",),
    "EFA": (".training={devices: {vpc.amazonaws.com/efa: 4}}",),
    "other accelerators": (".gpu_resource=amd.com/gpu", *ON_GPUS),
    "metrics": (".pod_monitor=true", ".network={monitoring_namespace: observability}"),
    "an open network": (".network={policy: false}",),
    "few ways out": (".network={egress_ports: [443], operator_namespace: kuberay-operator}",),
    "deadlines": (".deadline_seconds=172800", ".start_deadline_seconds=7200", ".ttl_seconds=0", ".retries=0"),
    "a large head": (".head={cpus: 8, memory_gib: 64, placement: {node_selector: {pool: heads}}}",),
    "more disk": (".scratch_gib=500",),
    "disk that is reserved": (".scratch_gib=500", ".reserve_scratch=true"),
    "lost nodes that are waited for": (".lost_node_seconds=300",),
    "many engines": ("reference.replicas=6", "reference.max_replicas=24"),
    "streaming": ("reference.mode=streaming",),
}
MATRIX = [
    *((path.stem, ()) for path in sorted(PIPELINES.glob("*.yaml"))),
    *(("quickstart", overrides) for overrides in OPTIONS.values()),
    *(("zephyr_7b_dpo", (*overrides,)) for name, overrides in OPTIONS.items() if "volume" not in name),
]
MATRIX_IDS = [f"{name}: {' '.join(overrides)[:60] or 'as it is'}" for name, overrides in MATRIX]

# After the manifests of KubeRay's own samples: data, reference and training groups, of which only training is fixed.
SOUND = """
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: sound
spec:
  submissionMode: HTTPMode
  entrypoint: python -m dpo_ray run --config /etc/dpo/config.yaml
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 600
  activeDeadlineSeconds: 172800
  backoffLimit: 2
  runtimeEnvYAML: |
    env_vars: {PYTHONUNBUFFERED: "1"}
  rayClusterSpec:
    rayVersion: "2.60.0"
    enableInTreeAutoscaling: true
    autoscalerOptions: {version: v2, idleTimeoutSeconds: 300}
    headGroupSpec:
      rayStartParams: {num-cpus: "0", dashboard-host: "0.0.0.0"}
      template:
        spec:
          restartPolicy: Never
          containers:
          - name: ray-head
            image: rayproject/ray:2.60.0-py311-cpu
            resources: {limits: {cpu: "4", memory: 16Gi}, requests: {cpu: "4", memory: 16Gi}}
    workerGroupSpecs:
    - groupName: data
      replicas: 1
      minReplicas: 0
      maxReplicas: 8
      labels: {dpo/role: data}
      template:
        spec:
          restartPolicy: Never
          containers:
          - name: ray-worker
            image: rayproject/ray:2.60.0-py311-cpu
            resources: {limits: {cpu: "16", memory: 64Gi}}
    - groupName: train
      replicas: 2
      minReplicas: 2
      maxReplicas: 2
      labels: {dpo/role: train}
      template:
        spec:
          nodeSelector: {cloud.google.com/gke-accelerator: nvidia-h100-80gb}
          tolerations: [{key: nvidia.com/gpu, operator: Exists}]
          containers:
          - name: ray-worker
            image: registry/dpo-ray:cu
            resources: {limits: {cpu: "64", memory: 512Gi, nvidia.com/gpu: "8"}}
"""


def sound_ray_job() -> dict[str, Any]:
    """Make a RayJob that KubeRay accepts."""
    return yaml.safe_load(SOUND)


def sound_ray_cluster() -> dict[str, Any]:
    """Make a RayCluster that KubeRay accepts."""
    spec = sound_ray_job()["spec"]["rayClusterSpec"]
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "sound"}, "spec": spec}


def recipe(pipeline: str = "quickstart", *overrides: str) -> Recipe:
    """Load a recipe of the project; an override that begins with `.` is of its profile for Kubernetes."""
    whole = [f"cluster.kubernetes{o}" if o.startswith(".") else o for o in overrides]
    return load_recipe(PIPELINES / f"{pipeline}.yaml", whole)


def changed(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set one field, at a path such as `spec.groups[0].name`; `None` removes it."""
    at: Any = manifest
    *through, last = [int(p) if p.isdigit() else p for p in path.replace("[", ".").replace("]", "").split(".")]
    for part in through:
        at = at[part] if isinstance(part, int) else at.setdefault(part, {})
    if value is None:
        del at[last]
    else:
        at[last] = value
    return manifest
