"""Pairs as token ids, read and cut by dpo_ray's own `prepare`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.load import validate_recipe
from dpo_ray.observe.progress import Reporter
from dpo_ray.run.offline import prepared

Pair = dict[str, list[int]]
"""prompt_ids, chosen_ids and rejected_ids."""


def prepared_pairs(rows: Sequence[Path], model: Path, max_length_tokens: int, cores: int, scratch: Path) -> list[Pair]:
    """Prepare files of preference rows (in Ray, on `cores` cores) with the model's tokenizer; returns all pairs."""
    recipe = validate_recipe(
        {
            "name": "benchmark",
            "output": str(scratch / "prepared"),
            "model": {"path": str(model)},
            "data": {
                "train": [str(path.resolve()) for path in rows],
                "chat_template": "plain",
                "max_length_tokens": max_length_tokens,
                "max_quarantined_fraction": 1,
            },
            "reference": {"engine": "trainer"},
            "evaluate": {"sample_prompts": 0},
            "trackers": [],
            "ray": {"cpus": cores},
        }
    )
    _, tokens = prepared(recipe, Reporter(Console(file=io.StringIO())))
    pairs: list[Pair] = []
    for name in tokens.names("train/"):
        for row in read_table(tokens, name, ["prompt_ids", "completion_ids"]).to_pylist():
            chosen, rejected = row["completion_ids"]
            pairs.append({"prompt_ids": row["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs
