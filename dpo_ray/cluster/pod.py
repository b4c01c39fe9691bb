"""The pod in which this process runs, as the KubeRay operator describes it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

POD_VARIABLE = "RAY_CLOUD_INSTANCE_ID"
NAMESPACE_VARIABLE = "RAY_CLUSTER_NAMESPACE"
GROUP_VARIABLE = "RAY_NODE_TYPE_NAME"
HEAD_GROUPS = ("headgroup", "head")  # what the operator, or Ray, calls the head's group


def pod_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return NAMESPACE/NAME of the pod, or "" outside of a pod of the KubeRay operator."""
    name = environment.get(POD_VARIABLE, "")
    return f"{environment.get(NAMESPACE_VARIABLE, '')}/{name}" if name else ""


def pod_group(environment: Mapping[str, str] = os.environ) -> str:
    """Return the pod's group as cluster.kubernetes names it (head, cpu, engines, training), or "" outside of a pod."""
    group = environment.get(GROUP_VARIABLE, "") if environment.get(POD_VARIABLE) else ""
    return "head" if group in HEAD_GROUPS else group
