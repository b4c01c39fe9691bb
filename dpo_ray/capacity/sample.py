"""The amount of data in a recipe whose data is on this machine but not yet prepared.

The amount is estimated from the first rows of some shards, which are tokenized as in the stage `prepare`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dpo_ray.config.model import is_hub_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.first_pass import PrepareTask, tokenized
from dpo_ray.data.groups import TokenGroup
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import Piece, Shard
from dpo_ray.models.load import model_directory
from dpo_ray.run.planning import Plan

from .workload import ASSUMED_ROWS, Workload, longest_group_tokens

SAMPLE_ROWS, MOST_SHARDS = 256, 8
SYNTHETIC = "synthetic"


def sampled_workload(recipe: Recipe, plan: Plan) -> Workload | None:
    """Estimate the amount of training data from the first rows of some shards, which are tokenized here.

    Filters are not applied, and duplicates are not removed. Return None if the tokenizer or all shards are not on this
    machine, or if no row is valid.
    """
    shards = [s for s in plan.checked.shards if s.split == "train" and _is_here(s)]
    if is_hub_name(recipe.model.path) or not shards:
        return None
    task = PrepareTask(str(model_directory(recipe.model)), plan.checked.template, recipe.data)
    sampled: list[TokenGroup] = []
    known, unknown, rows = 0, 0, 0
    for shard in shards[:MOST_SHARDS]:
        batch = [row for _, row in next(read_batches(Piece(shard), SAMPLE_ROWS), [])]
        sampled += [group for group in tokenized(batch, shard, task) if isinstance(group, TokenGroup)]
        rows += len(batch)
        count = _rows_of(shard, batch)
        known, unknown = known + (count or 0), unknown + (count is None)
    if not sampled:
        return None
    total = (known + unknown * ASSUMED_ROWS) * len(shards) / min(len(shards), MOST_SHARDS)
    completions = [len(c) for group in sampled for c in group.completion_ids]
    each = len(completions) / len(sampled)
    note = (
        f" ({ASSUMED_ROWS:,} assumed for each of {unknown} shards whose rows cannot be counted quickly)"
        if unknown
        else ""
    )
    return Workload(
        groups=max(1, round(total * len(sampled) / rows)),
        completions=each,
        prompt_tokens=sum(len(group.prompt_ids) for group in sampled) / len(sampled),
        completion_tokens=sum(completions) / len(completions),
        longest_group_tokens=longest_group_tokens(recipe, each),
        source=f"the first {rows:,} rows of {min(len(shards), MOST_SHARDS)} of {len(shards)} shards{note}",
    )


def _is_here(shard: Shard) -> bool:
    return shard.kind == SYNTHETIC or (shard.kind != "hub" and Path(shard.location).is_file())


def _rows_of(shard: Shard, batch: Sequence[Any]) -> int | None:
    """Return the number of rows of a shard, or None if the whole shard would have to be read to count them.

    For JSON Lines, the number is estimated from the mean size of the first rows, which are in `batch`.
    """
    if shard.kind == SYNTHETIC:
        return json.loads(shard.location)["pairs"]
    if shard.kind == "parquet":
        return pq.ParquetFile(shard.location).metadata.num_rows
    if len(batch) < SAMPLE_ROWS:
        return len(batch)  # the batch holds all rows
    if shard.kind == "json" and not shard.location.endswith((".gz", ".zst")):
        read = sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in batch if isinstance(row, dict))
        return round(Path(shard.location).stat().st_size / max(1, read) * len(batch))
    return None
