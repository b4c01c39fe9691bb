"""The resources that the workers of each role request. Imports no Ray, because manifests are sized by it as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_ray.config.judge import Judge, cpus_per_replica, members_of
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.config.roles import RoleConfig
from dpo_ray.config.train import TrainConfig


@dataclass(frozen=True)
class Resources:
    """The resources that each of several identical workers requests from Ray."""

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
        """Return the request as the options of an actor."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "memory": int((self.memory_gib or 0) * 2**30) or None,
            "label_selector": dict(self.labels) or None,
        }

    def describe(self) -> str:
        """Describe the request in words, for a person."""
        parts = [f"{self.cpus:g} CPU", *([f"{self.gpus:g} GPU"] if self.gpus else [])]
        parts += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        parts += [f"a node with {k}={v}" for k, v in self.labels.items()]
        return ", ".join(parts)


def worker_resources(config: TrainConfig, gpus_per_worker: float) -> Resources:
    """Return the resources that a training worker requests."""
    memory, labels = config.memory_gib_per_worker, config.node_labels
    return Resources("training workers", config.cpus_per_worker, gpus_per_worker, memory, labels)


def engine_resources(config: ReferenceConfig, gpus_per_engine: float) -> Resources:
    """Return the resources that an engine requests."""
    return Resources(
        "engines", config.cpus_per_replica, gpus_per_engine, config.memory_gib_per_replica, config.node_labels
    )


def sampler_resources(recipe: Recipe, engine_gpus: float) -> Resources:
    """Return the resources that an engine requests when it samples for an evaluation."""
    role, r = recipe.cluster.roles.sample, recipe.reference
    return Resources(
        "engines that sample",
        role.cpus or r.cpus_per_replica,
        engine_gpus,
        role.memory_gib or r.memory_gib_per_replica,
        r.node_labels if role.node_labels is None else role.node_labels,
    )


def judge_resources(judge: Judge, role: RoleConfig) -> Resources:
    """Return the resources that each process of a judge requests."""
    gpus = sum(m.gpus() for m in members_of(judge))
    cpus = cpus_per_replica(judge, role)
    return Resources("judges", cpus, gpus if role.gpus is None else role.gpus, role.memory_gib, role.node_labels or {})
