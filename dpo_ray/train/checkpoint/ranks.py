"""Communication between the ranks of a training run while they write and load checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from dpo_ray.errors import DpoRayError

T = TypeVar("T")


class Ranks:
    """All ranks of a run, or a single process without a process group.

    All ranks must construct this object together, and must call each of its methods together.
    """

    def __init__(self, hang_seconds: float) -> None:
        """Create a process group for checkpoints. In it, one rank waits at most `hang_seconds` for another."""
        self.rank, self.count = 0, 1
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            # A separate group, because the thread that writes checkpoints communicates while training does so, too.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=hang_seconds))
            self.group = group if isinstance(group, dist.ProcessGroup) else None  # it is an int only on ranks outside

    def gathered(self, value: T) -> list[T]:
        """Gather the values of all ranks; return them on every rank, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first_does(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0 only, and return the result on every rank.

        If `act` raises a DpoRayError, every rank raises that error.
        """
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
