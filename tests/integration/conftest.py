"""A small recipe on the built-in model and the synthetic source: every stage in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config.load import apply_overrides, validate_recipe
from dpo_ray.config.recipe import Recipe


def small_recipe(output: Path | str, *overrides: str) -> Recipe:
    """Make the recipe of these tests: 96 pairs, 6 steps, no sampling unless asked for."""
    values: dict[str, Any] = {
        "name": "small",
        "output": str(output),
        "model": {"path": "builtin:sentiment_llama"},
        "data": {
            "train": {"type": "synthetic", "pairs": 96},
            "eval": {"type": "synthetic", "pairs": 24},
            "chat_template": "plain",
            "max_length_tokens": 128,
        },
        "reference": {"audit": {"groups": 32}},
        "train": {
            "groups_per_step": 16,
            "tokens_per_micro_batch": 512,
            "optimizer": {"learning_rate": 3e-4},
            "eval_every_steps": 3,
            "checkpoint_every_steps": 2,
        },
        "evaluate": {"sample_prompts": 0, "max_new_tokens": 48},
    }
    return validate_recipe(apply_overrides(values, list(overrides)))


@pytest.fixture
def files_of():
    """Snapshot a directory: every file with its size and time of change."""

    def snapshot(root: Path) -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file()}

    return snapshot
