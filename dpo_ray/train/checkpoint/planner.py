"""DCP's plans of what each rank writes, made once per run: only rank 0 makes them, for the tensors of all ranks."""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner


class SharedPlanner(DefaultSavePlanner):
    """DCP's planner, which reuses the plans of the previous save if the tensors have not changed on any rank.

    In that case nothing is gathered. The cached plans take no more memory than planning takes at its peak.
    """

    def __init__(self, owner: str) -> None:
        """Share plans between all saves with the same `owner` in this process."""
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = owner  # by default all planners of a process share one key

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Build the plans of all ranks; runs on rank 0.

        Raises:
            RuntimeError: a rank refers to cached plans that rank 0 does not have. DCP would then write a checkpoint
                without that rank's tensors.
        """
        if self._cached_plans_key not in SavePlanner._cached_all_plans and not all(plan.usable for plan in all_plans):
            raise RuntimeError("a rank refers to plans of a save that rank 0 has not seen")
        return super().create_global_plan(all_plans)
