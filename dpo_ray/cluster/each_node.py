"""A function that runs once on every node of the cluster, whatever resources are free there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")


def on_each_node(function: Callable[..., T], *arguments: Any, deadline_seconds: float) -> Iterator[T]:
    """Run a function on every node that is alive, and yield the results as they arrive, until the deadline.

    A node that is lost meanwhile, or that does not answer in time, has no result.
    """
    until = time.monotonic() + deadline_seconds
    try:
        waiting = [
            ray.remote(function)
            .options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], False)
            )
            .remote(*arguments)
            for node in ray.nodes()
            if node["Alive"]
        ]
        while waiting and (left := until - time.monotonic()) > 0:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=left)
            for answer in ready:
                try:
                    yield ray.get(answer)
                except ray.exceptions.RayError:
                    continue
    except ray.exceptions.RayError:  # the connection itself is lost, which the watch reports
        return
