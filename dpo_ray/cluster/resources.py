"""The resources that each kind of worker requests.

This module does not import Ray, because it is also used to compute the sizes of Kubernetes pods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_ray.config.judge import Judge, cpus_per_replica, members_of
from dpo_ray.config.roles import JudgeRole, ReferenceRole, RolesConfig, TrainRole


@dataclass(frozen=True)
class Resources:
    """The resources that each worker of one kind requests from Ray."""

    what: str  # in the plural, as in `training workers`
    cpus: float
    gpus: float = 0.0
    memory_gib: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def as_ray(self) -> dict[str, float]:
        """Return the request in Ray's units: CPU, GPU, memory in bytes."""
        memory = int((self.memory_gib or 0) * 2**30)
        return {k: v for k, v in {"CPU": self.cpus, "GPU": self.gpus, "memory": memory}.items() if v}

    def options(self) -> dict[str, Any]:
        """Return the request as options of a Ray actor."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "memory": int((self.memory_gib or 0) * 2**30) or None,
            "label_selector": dict(self.labels) or None,
        }

    def describe(self) -> str:
        """Describe the request in words, for messages."""
        parts = [f"{self.cpus:g} CPU", *([f"{self.gpus:g} GPU"] if self.gpus else [])]
        parts += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        parts += [f"a node with {k}={v}" for k, v in self.labels.items()]
        return ", ".join(parts)


def worker_resources(role: TrainRole, gpus: float) -> Resources:
    """Return the resources that a training worker requests."""
    return Resources("training workers", role.cpus, gpus, role.memory_gib, role.node_labels)


def engine_resources(role: ReferenceRole, gpus: float) -> Resources:
    """Return the resources that an engine requests."""
    return Resources("engines", role.cpus, gpus, role.memory_gib, role.node_labels)


def sampler_resources(roles: RolesConfig, gpus: float) -> Resources:
    """Return the resources that an engine requests when it samples for an evaluation."""
    role, engine = roles.sample, roles.reference
    return Resources(
        "engines that sample",
        role.cpus or engine.cpus,
        gpus,
        role.memory_gib or engine.memory_gib,
        engine.node_labels if role.node_labels is None else role.node_labels,
    )


def judge_resources(judge: Judge, role: JudgeRole) -> Resources:
    """Return the resources that each process of a judge requests."""
    gpus = sum(m.gpus() for m in members_of(judge))
    cpus = cpus_per_replica(judge, role)
    return Resources("judges", cpus, gpus if role.gpus is None else role.gpus, role.memory_gib, role.node_labels)
