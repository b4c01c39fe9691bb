"""DCP's plans, which list the tensors that each rank writes. Rank 0 makes the plans of all ranks, once in a run."""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner


class SharedPlanner(DefaultSavePlanner):
    """DCP's planner, set up to reuse the plans of the previous save if no rank's tensors have changed.

    If plans are reused, they need not be gathered from all ranks. The cached plans need no more memory than the
    planning.
    """

    def __init__(self, owner: str) -> None:
        """Create a planner that shares its cached plans with all planners of this process with the same `owner`."""
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = owner  # by default all planners of a process share one key

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Build the plans of all ranks; runs on rank 0.

        Raises:
            RuntimeError: a rank reuses cached plans, but rank 0 does not have them. Without this error, DCP would write
                a checkpoint that lacks that rank's tensors.
        """
        if self._cached_plans_key not in SavePlanner._cached_all_plans and not all(plan.usable for plan in all_plans):
            raise RuntimeError("a rank reuses the plans of a previous save, but rank 0 has no such plans")
        return super().create_global_plan(all_plans)
