"""The ranks of a run, and their communication about checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from dpo_ray.errors import DpoRayError

T = TypeVar("T")


class Ranks:
    """All ranks, or a single process. All ranks construct it together, and every method is collective."""

    def __init__(self, hang_seconds: float) -> None:
        """Create the process group, in which a rank waits for another for at most `hang_seconds`."""
        self.rank, self.count = 0, 1
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            # A separate group: checkpoint writing communicates in one thread while training does so in another.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=hang_seconds))
            self.group = group if isinstance(group, dist.ProcessGroup) else None  # it is an int only on ranks outside

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first_does(self, act: Callable[[], T]) -> T:
        """Run `act` on rank 0 only; every rank returns its result, or raises its error if that is a DpoRayError."""
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
        """Wait until all ranks have called this (a barrier)."""
        if self.group is not None:
            dist.barrier(group=self.group)
