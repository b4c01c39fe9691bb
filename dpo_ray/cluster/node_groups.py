"""The groups of nodes that a cluster may have at most, which its head's environment names.

Ray's autoscaler reports the nodes that it has, but not the nodes that it could add. Therefore the manifests of a cluster
on Kubernetes put its groups into a variable of the head's pod, where drivers run. This module does not import Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from dpo_ray.config.roles import RolesConfig

from .requests import fitting
from .resources import Resources

VARIABLE = "DPO_RAY_NODE_GROUPS"
ROLE = "dpo/role"  # a label of Ray's nodes; KubeRay puts it on their pods as well
DEFAULT_LABELS = {"train": {ROLE: "training"}, "reference": {ROLE: "reference"}}


@dataclass(frozen=True)
class NodeGroup:
    """A group of identical nodes: the size and the labels of one node, and the largest number of nodes."""

    name: str
    cpus: float
    gpus: float
    memory_gib: float
    labels: Mapping[str, str]
    most: int

    @property
    def resources(self) -> dict[str, float]:
        """Return the resources of one node in Ray's units: CPU, GPU, memory in bytes."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gib * 2**30}


def as_text(groups: Iterable[NodeGroup]) -> str:
    """Write groups as the value of the variable."""
    return json.dumps([asdict(group) for group in groups])


def node_groups() -> list[NodeGroup]:
    """Read the groups of the cluster from this process's environment; return [] if it does not name them."""
    return [NodeGroup(**group) for group in json.loads(os.environ.get(VARIABLE, "[]"))]


def capacity_of(groups: Sequence[NodeGroup], request: Resources) -> int:
    """Return how many workers with this request fit on all nodes that the groups may have.

    Labels with the prefix ray.io/ are assumed to be there, because Ray sets them itself when a node starts.
    """
    wanted = {key: value for key, value in request.labels.items() if not key.startswith("ray.io/")}
    return sum(g.most * fitting(request, g.resources) for g in groups if has_labels(g.labels, wanted))


def totals_of(groups: Sequence[NodeGroup]) -> dict[str, float]:
    """Return the resources of all nodes that the groups may have, in Ray's units."""
    return {kind: sum(g.most * g.resources[kind] for g in groups) for kind in ("CPU", "GPU", "memory")}


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether a node has the wanted labels.

    Conditions on a label, `in(...)` (one of these values) and `!...` (not this value), are assumed to be true.
    """
    return all(v.startswith(("in(", "!")) or labels.get(k) == v for k, v in wanted.items())


def with_labels(roles: RolesConfig, groups: Sequence[NodeGroup]) -> RolesConfig:
    """Fill in the node labels of training workers and engines that the recipe does not set, where a group has them."""
    filled = {}
    for name, labels in DEFAULT_LABELS.items():
        role = getattr(roles, name)
        if not role.node_labels and any(has_labels(g.labels, labels) for g in groups):
            filled[name] = role.model_copy(update={"node_labels": dict(labels)})
    return roles.model_copy(update=filled)
