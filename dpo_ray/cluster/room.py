"""Room on the cluster for workers that are alike: whether it can ever be enough, and waiting until it is there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray
from ray import PlacementGroupID
from ray._private.state import state  # pyright: ignore[reportPrivateImportUsage] - Ray 2.60 says it nowhere else
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

PATIENCE_SECONDS = 30.0  # for all workers, before fewer of them begin
SCALING_PATIENCE_SECONDS = 600.0  # the same where the cluster gets nodes on demand, which takes minutes
PROBE_SECONDS = 3.0  # within which room that is free is granted
SAY_SECONDS = 30.0


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
        memory = self.memory_gib * 2**30 if self.memory_gib else 0
        return {k: v for k, v in {"CPU": self.cpus, "GPU": self.gpus, "memory": memory}.items() if v}

    def words(self) -> str:
        """Say it, for a person."""
        asked = [f"{self.cpus:g} CPU", *([f"{self.gpus:g} GPU"] if self.gpus else [])]
        asked += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        asked += [f"a node with {k}={v}" for k, v in self.labels.items()]
        return ", ".join(asked)


def capacity(ask: Ask) -> int:
    """Count the workers that the nodes which are there now would hold, if nothing else ran on them."""
    nodes = [n for n in ray.nodes() if n["Alive"] and _has(n.get("Labels") or {}, ask.labels)]
    return sum(_fit(ask, node["Resources"]) for node in nodes)


def capacity_to_come(ask: Ask) -> int | None:
    """Count the workers that the cluster would hold when scaled up all the way; None: it does not scale.

    Ray's autoscaler says what resources the nodes of a group have, and not their labels, so this may be too many.
    """
    config = state.get_cluster_config()
    groups = config.node_group_configs if config is not None else []
    if not groups:
        return None
    return sum(_fit(ask, group.resources) * group.max_count for group in groups)


def wait(ask: Ask, least: int, most: int, say: Callable[[str], None]) -> int:
    """Wait until there is room for `most` workers, or after a while for at least `least`; returns for how many.

    What waits is a placement group, so a cluster that scales adds nodes for it. `say` is told, every half a minute, how many
    have room and what is missing.
    """
    patience = PATIENCE_SECONDS if capacity_to_come(ask) is None else SCALING_PATIENCE_SECONDS
    began = time.monotonic()
    said_at = began
    with _asked(ask, most) as group:
        while not group.wait(PROBE_SECONDS):
            now = time.monotonic()
            if least < most and now - began >= patience and (found := _largest(ask, least, most)):
                say(f"there is room for {found} of {most} {ask.what}: they go on without the others")
                return found
            if now - said_at >= SAY_SECONDS:
                say(
                    f"{most} {ask.what} wait for room, and the nodes that are there could hold {min(capacity(ask), most)}; "
                    f"each asks for {ask.words()}"
                )
                said_at = now
    return most


def has_room(ask: Ask, count: int) -> bool:
    """Say whether so many more workers could start now."""
    with _asked(ask, count) as group:
        return bool(group.wait(PROBE_SECONDS))


@contextmanager
def given_back() -> Iterator[None]:
    """See that what is set aside for this run within is not left behind, as Ray Train does where workers fail to start."""
    before = _groups_of_this_run()
    try:
        yield
    finally:
        for left in _groups_of_this_run() - before:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(left))))


def _groups_of_this_run() -> set[str]:
    job = ray.get_runtime_context().get_job_id()  # which a group's id ends with
    return {i for i, group in placement_group_table().items() if i.endswith(job) and group["state"] != "REMOVED"}


def _largest(ask: Ask, least: int, most: int) -> int | None:
    """Find the largest number of workers below `most` that have room now, which is `least` or more."""
    for count in range(min(capacity(ask), most - 1), least - 1, -1):
        if has_room(ask, count):
            return count
    return None


@contextmanager
def _asked(ask: Ask, count: int) -> Iterator[PlacementGroup]:
    group = placement_group(
        [ask.resources] * count, strategy="PACK", bundle_label_selector=[dict(ask.labels) for _ in range(count)]
    )
    try:
        yield group
    finally:
        remove_placement_group(group)


def _fit(ask: Ask, resources: Mapping[str, float]) -> int:
    return min(math.floor(resources.get(name, 0.0) / amount + 1e-9) for name, amount in ask.resources.items())


def _has(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Match labels as Ray does, as far as it is plain: a value is equal. Of `in(...)` and `!` it is hoped that they match."""
    return all(v.startswith(("in(", "!")) or labels.get(k) == v for k, v in wanted.items())
