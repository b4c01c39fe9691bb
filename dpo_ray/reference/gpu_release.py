"""Release of GPUs: functions that wait until the engines' processes have ended and their GPU memory is free."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.errors import InfrastructureError

DEADLINE_SECONDS = 120.0
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """The process, node and GPUs of an engine."""

    pid: int
    node: str  # Ray's id
    gpus: tuple[str, ...]  # the GPUs that Ray assigned to it, by index on its node


def place_of_this_process() -> Place:
    """Return the process id, node and GPUs of the current process. Call this in an engine's actor."""
    context = ray.get_runtime_context()
    return Place(os.getpid(), context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ())))


def wait_until_dead(actors: Sequence[Any], deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until Ray has marked the killed actors as dead. Only then are the resources of these actors free.

    Args:
        actors: the killed actors, whose class must have a method `alive`.

    Raises:
        InfrastructureError: an actor is not dead before the deadline.
    """
    end = time.monotonic() + deadline_seconds
    for actor in actors:
        while True:
            try:
                ray.get(actor.alive.remote(), timeout=max(0.0, end - time.monotonic()))
            except GetTimeoutError:
                pass
            except RayError:
                break
            if time.monotonic() > end:
                raise InfrastructureError(
                    f"{deadline_seconds:.0f} s after an engine was stopped, its process has not ended",
                    where="reference",
                    fix="run the same command again: finished scores are in the store",
                )
            time.sleep(POLL_SECONDS / 10)


def wait_until_memory_is_free(
    places: Sequence[Place], share: float, deadline_seconds: float = DEADLINE_SECONDS
) -> None:
    """Wait until enough memory is free on each GPU that an engine used.

    A GPU's memory becomes free some time after the process has ended. A training run that starts too early fails.

    Args:
        share: fraction of each GPU's memory that must be free; an engine needs this much to start.

    Raises:
        InfrastructureError: the memory is not free before the deadline.
    """
    by_node: dict[str, set[str]] = {}
    for place in places:
        by_node.setdefault(place.node, set()).update(place.gpus)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if any(by_node.values()) else set()
    checks = [
        # The task requests no GPU: Ray has released them, and a task without GPUs sees all GPUs of its node.
        ray.remote(num_cpus=0, max_calls=1)(_least_free_share)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(sorted(gpus), share, deadline_seconds)
        for node, gpus in by_node.items()
        if gpus and node in alive
    ]
    for free in ray.get(checks):
        if free < share:
            raise InfrastructureError(
                f"{deadline_seconds:.0f} s after the engines ended, only {free:.0%} of a GPU's memory is free, not {share:.0%}",
                where="reference",
                fix="look for other processes on the GPU (nvidia-smi) and run again: finished scores are in the store",
            )


def _least_free_share(gpus: Sequence[str], share: float, deadline_seconds: float) -> float:
    """Wait until each of this node's `gpus` has the fraction `share` of its memory free, or until the deadline.

    Return the smallest fraction of free memory among these GPUs at the end of the wait.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    import torch

    end = time.monotonic() + deadline_seconds
    while True:
        free = min(available / total for available, total in map(torch.cuda.mem_get_info, range(len(gpus))))
        if free >= share or time.monotonic() > end:
            return free
        time.sleep(POLL_SECONDS)
