"""What the data plane comes to for many groups: files, tasks and indexes, by the project's own constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_ray.config.data import DataConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.data.stage import PARTS_PER_TASK
from dpo_ray.reference.stage import PARTS_OF_A_LOOK_UP
from dpo_ray.schedule.buckets import DEALT_BYTES, MOST_OPEN_FILES
from dpo_ray.schedule.files import bucket_ranges, most_bucket_steps

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
        """Return the bytes of the store's index that a node holds, once the index is built."""
        return 2 * self.groups * INDEX_BYTES

    @property
    def candidate_bytes(self) -> int:
        """Return the bytes that the driver holds while it applies the rules over all rows."""
        return self.groups * CANDIDATE_BYTES

    @property
    def steps(self) -> int:
        return math.ceil(self.groups / self.groups_per_step)

    @property
    def bucket_steps(self) -> int:
        """Return the largest number of steps in a bucket."""
        return most_bucket_steps([range(self.groups_per_step)])

    @property
    def buckets(self) -> int:
        """Count the runs of steps."""
        return len(bucket_ranges(self.steps, self.bucket_steps))

    @property
    def schedule_files(self) -> int:
        return self.buckets * self.ranks

    @property
    def bucket_groups(self) -> int:
        """Count the groups of the largest bucket, which is packed in memory."""
        return self.bucket_steps * self.groups_per_step

    @property
    def dealings(self) -> list[int]:
        """Return to how many files rows are dealt in each pass: no more than may be open at once."""
        files: list[int] = []
        left = self.buckets
        while left > MOST_OPEN_FILES:
            shared = math.ceil(left / MOST_OPEN_FILES)
            files.append(math.ceil(left / shared))
            left = shared
        return [*files, left]

    def dealt_pieces(self, row_bytes: float) -> list[float]:
        """Count the pieces that each dealing writes, on average: rows fall into buckets as evenly as chance has it."""
        pieces, sources = [], 1
        for files in self.dealings:
            rows = self.groups / sources  # of what is dealt at a stretch
            at_once = max(1.0, min(rows, max(ROWS_PER_PART, DEALT_BYTES / row_bytes)))
            pieces.append(self.groups / at_once * files * (1 - (1 - 1 / files) ** at_once))
            sources *= files
        return pieces

    @property
    def rank_steps(self) -> int:
        """Count the row groups of the schedule."""
        return self.steps * self.ranks
