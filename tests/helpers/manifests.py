"""Recipes on Kubernetes, made in memory, and a sound RayJob that is none of the renderer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpo_ray.config.load import load_recipe
from dpo_ray.config.recipe import Recipe

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"

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
