"""Workers that were killed for lack of memory: which pod, its limit, and the field of the recipe to change.

Two of them kill: the kernel, at the limit of a container, and Ray's own monitor shortly before. Ray says only of its own
kills what they were. For those of the kernel, each node is asked how many processes were killed at its limit.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

import ray
from ray.exceptions import ActorDiedError, LocalRayletDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError

from dpo_ray.errors import MemoryLimitError
from dpo_ray.observe.text import size

from .cgroup import memory_limit
from .each_node import on_each_node
from .pod import pod_group, pod_name

DEATHS = (ActorDiedError, LocalRayletDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
BY_RAY = ("memory pressure", "running low on memory", "out of memory", "out-of-memory")
DEADLINE_SECONDS = 10.0
GROUP_OF_ROLE = {"train": "training", "reference": "engines", "sample": "engines", "judge": "cpu", "prepare": "cpu"}

_known_kills: dict[str, int] = {}  # by Ray's id of the node


@dataclass(frozen=True)
class NodeMemory:
    """The memory of one node: its pod or machine, the pod's group, the limit, and the kills at the limit."""

    node: str  # Ray's id
    address: str
    place: str
    group: str
    limit_bytes: int | None
    kills: int


def memory_here() -> NodeMemory:
    """Return the memory of this node; this runs as a task on each node."""
    context, limit = ray.get_runtime_context(), memory_limit()
    place, address = pod_name(), ray.util.get_node_ip_address()
    named = f"pod {place}" if place else f"machine {socket.gethostname()}"
    bytes_, kills = (limit.bytes, limit.kills) if limit is not None else (None, 0)
    return NodeMemory(context.get_node_id(), address, named, pod_group(), bytes_, kills)


def count_kills_here() -> None:
    """Remember how many processes this node has killed before the run, so that they are not counted as the run's."""
    here = memory_here()
    _known_kills.setdefault(here.node, 0 if here.group else here.kills)


def lack_of_memory(what: str, role: str, cause: BaseException | str) -> MemoryLimitError | None:
    """Return an error that names the lack of memory that workers died of, or None if they did not die of it.

    Args:
        what: the workers, in the plural.
        role: their role in cluster.roles.
        cause: Ray's error, or its text.
    """
    text = str(cause).lower()
    by_ray = isinstance(cause, OutOfMemoryError) or any(words in text for words in BY_RAY)
    if not by_ray and not isinstance(cause, (*DEATHS, str)):
        return None
    nodes = list(on_each_node(memory_here, deadline_seconds=DEADLINE_SECONDS))
    struck = [node for node in nodes if node.kills > _known_kills.get(node.node, 0 if node.group else node.kills)]
    _known_kills.update({node.node: node.kills for node in nodes})
    if by_ray:
        struck = [node for node in nodes if re.search(rf"\b{re.escape(node.address)}\b", text)] or struck
    return memory_error(what, role, struck, by_ray=by_ray) if struck or by_ray else None


def memory_error(what: str, role: str, struck: list[NodeMemory], *, by_ray: bool) -> MemoryLimitError:
    """Build the error: who killed, where, at which limit, and what to change."""
    first = next(iter(struck), None)
    who = "Ray, shortly before the limit," if by_ray else "the kernel"
    places = ", ".join(_described(node) for node in struck[:3]) or "a node that no longer answers"
    more = f" and {len(struck) - 3} more" if len(struck) > 3 else ""
    if first is not None and not first.group:
        where = f"cluster.roles.{role}"
        fix = f"{_less(role)}, or use a machine with more memory"
    else:
        group = first.group if first is not None else GROUP_OF_ROLE[role]
        where = f"cluster.kubernetes.{group}.memory_gib"
        fix = f"raise this field and apply the recipe again, or {_less(role)}"
    return MemoryLimitError(f"{who} has killed {what} for lack of memory on {places}{more}", where=where, fix=fix)


def _described(node: NodeMemory) -> str:
    return f"{node.place} (limit: {size(node.limit_bytes)})" if node.limit_bytes is not None else node.place


def _less(role: str) -> str:
    """Return how workers of a role need less memory."""
    if role == "train":
        return "lower train.tokens_per_micro_batch, or train with more workers, which share the model"
    return (
        "lower reference.max_batched_tokens" if role in ("reference", "sample") else f"lower cluster.roles.{role}.count"
    )
