"""What the data plane comes to for many groups: files, tasks and indexes, by the project's own constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_ray.config.data import DataConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.data.stage import PARTS_PER_TASK
from dpo_ray.reference.stage import PARTS_OF_A_LOOK_UP
from dpo_ray.schedule.records import bucket_ranges

ROWS_PER_PART: int = DataConfig.model_fields["rows_per_part"].default
GROUPS_PER_GRANULE: int = ReferenceConfig.model_fields["groups_per_granule"].default
INDEX_BYTES = 24  # a key, as `StoreIndex` says
CANDIDATE_BYTES = 52  # a row, as `Candidates` says


@dataclass(frozen=True)
class Plane:
    """What so many groups of two completions come to."""

    groups: int
    ranks: int
    groups_per_step: int

    @property
    def parts(self) -> int:
        """Count the Parquet files of the tokens; the shards and the reference have as many each."""
        return math.ceil(self.groups / ROWS_PER_PART)

    @property
    def merge_tasks(self) -> int:
        return math.ceil(self.parts / PARTS_PER_TASK)

    @property
    def look_up_tasks(self) -> int:
        return math.ceil(self.parts / PARTS_OF_A_LOOK_UP)

    @property
    def segments(self) -> int:
        """Count the store's segments, one a granule, before `dpo-ray store gc` merges any."""
        return math.ceil(self.groups / GROUPS_PER_GRANULE)

    @property
    def index_bytes(self) -> int:
        """Say what a node holds of the store's index, once it is made."""
        return 2 * self.groups * INDEX_BYTES

    @property
    def candidate_bytes(self) -> int:
        """Say what the driver holds while it applies the rules over all rows."""
        return self.groups * CANDIDATE_BYTES

    @property
    def steps(self) -> int:
        return math.ceil(self.groups / self.groups_per_step)

    @property
    def buckets(self) -> int:
        """Count the runs of steps: as many files are open at once while rows are dealt to them."""
        return len(bucket_ranges(self.steps))

    @property
    def schedule_files(self) -> int:
        return self.buckets * self.ranks

    @property
    def bucket_groups(self) -> int:
        """Count the groups of the largest bucket, which is packed in memory."""
        return max(map(len, bucket_ranges(self.steps))) * self.groups_per_step

    @property
    def dealt_pairs(self) -> int:
        """Count what dealing does: for every part a slice for every bucket, empty ones too."""
        return self.parts * self.buckets

    @property
    def filled_pairs(self) -> float:
        """Count those that are not empty, on average: a part's rows fall into buckets as evenly as chance has it."""
        return self.dealt_pairs * (1 - (1 - 1 / self.buckets) ** ROWS_PER_PART)

    @property
    def rank_steps(self) -> int:
        """Count the row groups of the schedule."""
        return self.steps * self.ranks
