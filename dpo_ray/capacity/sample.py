"""The workload of a recipe whose data is local but not prepared: from the first rows of each shard, tokenized as in
`prepare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dpo_ray.config.model import is_hub_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.pairing import paired
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import Piece, Shard
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.data.tokenizing.template_process import TemplateProcess
from dpo_ray.data.tokenizing.tokenize import tokenize_groups
from dpo_ray.models.load import model_directory
from dpo_ray.run.planning import Plan

from .workload import ASSUMED_ROWS, Workload, longest_group_tokens

SAMPLE_ROWS, MOST_SHARDS = 256, 8
SYNTHETIC = "synthetic"


def sampled_workload(recipe: Recipe, plan: Plan) -> Workload | None:
    """Tokenize the first rows of some training shards; return None if the tokenizer or all shards are not on this
    machine.

    Filters are not applied, and duplicates are not removed.
    """
    shards = [s for s in plan.checked.shards if s.split == "train" and _is_here(s)]
    if is_hub_name(recipe.model.path) or not shards:
        return None
    tokenizer = load_tokenizer(str(model_directory(recipe.model)))
    sampled: list[TokenGroup] = []
    known, unknown, rows = 0, 0, 0
    with TemplateProcess() as process:
        for shard in shards[:MOST_SHARDS]:
            batch = [row for _, row in next(read_batches(Piece(shard), SAMPLE_ROWS), [])]
            texts = [_text(row, shard, recipe) for row in batch]
            tokenized = tokenize_groups(texts, tokenizer, plan.checked.template, recipe.data, process)
            sampled += [group for group in tokenized if isinstance(group, TokenGroup)]
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


def _text(row: Any, shard: Shard, recipe: Recipe) -> TextGroup | Rejected:
    if not isinstance(row, dict):
        return row if isinstance(row, Rejected) else Rejected("NOT_AN_OBJECT", type(row).__name__)
    try:
        return paired(text_group(row, shard.row_format, shard.columns, shard.criteria), recipe.data.pairing)
    except Rejected as rejected:
        return rejected


def _rows_of(shard: Shard, batch: Sequence[Any]) -> int | None:
    """Count the rows of a shard, those of JSON Lines by the size of the rows read; None if the whole shard must be
    read."""
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
