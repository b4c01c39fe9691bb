"""Decides in which order buckets (ranges of steps) are scored and written, while training already reads the first ones.

All functions are pure, except `deal_turns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .buckets import Bucket, Steps, buckets_of, deal_rows

SPARE_ROWS = 8192  # the maximum number of rows in a turn whose rows are in no step


@dataclass(frozen=True)
class Turn:
    """The groups of one bucket, which are scored together. `file` has one table row for each group.

    Its column `row` is the group's number in the split.
    """

    bucket: Bucket
    file: Path
    is_scheduled: bool  # False: these rows are in no step; only the artifact `reference` needs their log-probs


def in_turn(buckets: Mapping[str, Sequence[Bucket]], start_step: int, eval_every_steps: int | None) -> list[Bucket]:
    """Sort the buckets of all splits in the order in which training reads them if it begins at `start_step`.

    The held-out splits come before the training steps that follow the first evaluation. Buckets before `start_step` come
    last: training that resumes from a checkpoint does not read these buckets, but the artifact still needs them.
    """
    evaluation = None if eval_every_steps is None else (start_step // eval_every_steps + 1) * eval_every_steps
    behind = [b for b in buckets["train"] if b.stop_step <= start_step]
    ahead = buckets["train"][len(behind) :]
    before = [b for b in ahead if evaluation is None or b.first_step < evaluation]
    heldout = [b for split, of_split in buckets.items() if split != "train" for b in of_split]
    return [*before, *heldout, *ahead[len(before) :], *behind]


def spare_rows(split: str, steps: Steps, groups: int) -> list[Bucket]:
    """Build buckets of the rows that are in no step.

    There are such rows if `train.steps` ends training within the first epoch.
    """
    in_steps = np.zeros(groups, bool)
    for step in steps:
        in_steps[np.asarray(step, np.int64)] = True
    spare = np.flatnonzero(~in_steps)
    return [Bucket(split, len(steps), [spare[i : i + SPARE_ROWS].tolist()]) for i in range(0, len(spare), SPARE_ROWS)]


def deal_turns(
    splits: Iterable[tuple[str, Sequence[Callable[[], pa.Table]], Steps, int]],
    start_step: int,
    eval_every_steps: int | None,
    scratch: Path,
) -> list[Turn]:
    """Write the rows of all splits to files below `scratch`, one file per turn (rows that are scored together).

    Return the turns in the order in which they must be scored.

    Args:
        splits: for each split, its name, the functions that load its tables, its steps, and its number of groups.
    """
    buckets: dict[str, list[Bucket]] = {}
    spare: list[Bucket] = []
    files: dict[int, Path] = {}
    for split, parts, steps, groups in splits:
        buckets[split], spare_of_split = buckets_of(split, steps), spare_rows(split, steps, groups)
        place = scratch / split
        place.mkdir()
        everything = [*buckets[split], *spare_of_split]
        files |= {id(b): f for b, f in zip(everything, deal_rows(parts, everything, place), strict=True)}
        spare += spare_of_split
    scheduled = in_turn(buckets, start_step, eval_every_steps)
    return [Turn(b, files[id(b)], True) for b in scheduled] + [Turn(b, files[id(b)], False) for b in spare]
