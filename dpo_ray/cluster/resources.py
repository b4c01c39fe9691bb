"""What the workers of each role ask of the cluster. Imports no Ray: manifests are sized by it as well."""

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
class Ask:
    """What each of several like workers asks Ray for."""

    what: str  # in the plural, as in `training workers`
    cpus: float
    gpus: float = 0.0
    memory_gib: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def resources(self) -> dict[str, float]:
        """Return it as Ray has it: CPU, GPU, memory in bytes."""
        memory = int((self.memory_gib or 0) * 2**30)
        return {k: v for k, v in {"CPU": self.cpus, "GPU": self.gpus, "memory": memory}.items() if v}

    def options(self) -> dict[str, Any]:
        """Return it as an actor's options."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "memory": int((self.memory_gib or 0) * 2**30) or None,
            "label_selector": dict(self.labels) or None,
        }

    def words(self) -> str:
        """Say it, for a person."""
        asked = [f"{self.cpus:g} CPU", *([f"{self.gpus:g} GPU"] if self.gpus else [])]
        asked += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        asked += [f"a node with {k}={v}" for k, v in self.labels.items()]
        return ", ".join(asked)


def worker_ask(config: TrainConfig, gpus_per_worker: float) -> Ask:
    """Say what a training worker asks the cluster for."""
    memory, labels = config.memory_gib_per_worker, config.node_labels
    return Ask("training workers", config.cpus_per_worker, gpus_per_worker, memory, labels)


def engine_ask(config: ReferenceConfig, gpus_per_engine: float) -> Ask:
    """Say what an engine asks the cluster for."""
    return Ask("engines", config.cpus_per_replica, gpus_per_engine, config.memory_gib_per_replica, config.node_labels)


def sampler_ask(recipe: Recipe, engine_gpus: float) -> Ask:
    """Say what an engine that samples for an evaluation asks for."""
    role, r = recipe.cluster.roles.sample, recipe.reference
    return Ask(
        "engines that sample",
        role.cpus or r.cpus_per_replica,
        engine_gpus,
        role.memory_gib or r.memory_gib_per_replica,
        r.node_labels if role.node_labels is None else role.node_labels,
    )


def judge_ask(judge: Judge, role: RoleConfig) -> Ask:
    """Say what each process of a judge asks for."""
    gpus = sum(m.gpus() for m in members_of(judge))
    cpus = cpus_per_replica(judge, role)
    return Ask("judges", cpus, gpus if role.gpus is None else role.gpus, role.memory_gib, role.node_labels or {})
