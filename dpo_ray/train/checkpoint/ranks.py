"""The ranks of a run, and what they tell each other about its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from dpo_ray.errors import DpoRayError

T = TypeVar("T")


class Ranks:
    """All ranks, or this process alone. Every rank makes one, at the same time; every method is collective."""

    def __init__(self, hang_seconds: float) -> None:
        """Let one rank wait for another for at most `hang_seconds`."""
        self.rank, self.count = 0, 1
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            # A group of its own: writing talks to the other ranks in a thread, while training does so in another.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=hang_seconds))
            self.group = group if isinstance(group, dist.ProcessGroup) else None  # an int for ranks outside it: none

    def gathered(self, value: T) -> list[T]:
        """Return the value of every rank, to every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first_does(self, act: Callable[[], T]) -> T:
        """Let rank 0 alone act; what it returns or raises (of the project's errors) is returned or raised on every rank."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = act()
            except DpoRayError as error:
                outcome = error
        if self.group is not None:
            box = [outcome]
            dist.broadcast_object_list(box, src=0, group=self.group)
            outcome = box[0]
        if isinstance(outcome, DpoRayError):
            raise outcome
        return outcome

    def meet(self) -> None:
        """Wait until all ranks are here."""
        if self.group is not None:
            dist.barrier(group=self.group)
