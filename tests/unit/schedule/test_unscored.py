"""Groups without reference log-probs are in no step: the steps are those of the groups that are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.reference.join import REFERENCE
from dpo_ray.schedule import stage
from dpo_ray.schedule.files import read_steps
from dpo_ray.schedule.order import epoch_order
from tests.helpers.schedules import group_id
from tests.unit.schedule.test_stage import TRAIN, begin, row, tokens_of


def reference_of(tokens: Artifact, root: Path, unscored: set[bytes]) -> Artifact:
    """Commit a reference in which a group's log-probs are minus the first token of its prompt."""
    staging, entries = begin(root, "reference"), []
    for name in tokens.names():
        rows = [
            {
                "group_id": r["group_id"],
                "token_logps": None
                if r["group_id"] in unscored
                else [[-float(r["prompt_ids"][0])] * len(c) for c in r["completion_ids"]],
            }
            for r in read_table(tokens, name).to_pylist()
        ]
        entries.append(staging.write(name, parquet_bytes(pa.Table.from_pylist(rows, schema=REFERENCE))))
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows={}, figures={})


def test_unscored_groups_are_left_out_of_training_and_held_out_steps(tmp_path: Path) -> None:
    numbers = {"train": [range(6), range(6, 13)], "eval": [range(20, 26)]}
    tokens = tokens_of(
        tmp_path, **{split: [[row(n) for n in part] for part in parts] for split, parts in numbers.items()}
    )
    left_out = {group_id(n) for n in (0, 7, 8, 12, 25)}
    reference = reference_of(tokens, tmp_path, left_out)
    schedule = stage.run(tokens, reference, TRAIN, 0, begin(tmp_path, "schedule"), Provenance(1, {}, {}, {}))
    counts = {"train/steps": 3, "train/groups": 9, "eval/steps": 2, "eval/groups": 5}
    assert schedule.manifest.rows == counts | {"train/bucket_steps": 128, "eval/bucket_steps": 128}
    for split, parts in numbers.items():
        scored = [group_id(n) for part in parts for n in part if group_id(n) not in left_out]
        expected = [scored[i] for i in epoch_order(scored, 0, 0)]  # as if the others had never been there
        for number, shares in enumerate(zip(*(read_steps(schedule, split, r) for r in range(2)), strict=True)):
            batches = [m for share in shares for m in share.micro_batches if m.weight.any()]
            ids = {i for m in batches for i in m.group_ids}
            assert ids == set(expected[4 * number : 4 * number + 4])
            for m in batches:  # every group has its own log-probs: those of its prompt's first token
                first = {g: m.input_ids[m.group_index == g][0] for g in range(len(m.group_ids))}
                owners = m.group_index[m.completion_index > 0]
                assert np.array_equal(m.reference_token_logps, [-float(first[g]) for g in owners])
