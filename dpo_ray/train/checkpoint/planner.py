"""DCP's plans of what each rank writes, made once in a run: rank 0 alone makes them, for all ranks' tensors."""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner


class SharedPlanner(DefaultSavePlanner):
    """Plans a save as DCP does; where no rank's tensors are others than in the save before, that one's plans hold.

    Nothing is gathered then. What it keeps for that is no more than planning takes at its peak.
    """

    def __init__(self, owner: str) -> None:
        """Share the plans of all saves that name the same `owner` in this process."""
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = owner  # by default all planners of a process share, those of another world too

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Plan for all ranks; on rank 0.

        Raises:
            RuntimeError: a rank means plans that are not here. DCP would write a checkpoint without its tensors.
        """
        if self._cached_plans_key not in SavePlanner._cached_all_plans and not all(plan.usable for plan in all_plans):
            raise RuntimeError("a rank refers to plans of a save that rank 0 has not seen")
        return super().create_global_plan(all_plans)
