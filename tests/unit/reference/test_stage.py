"""Which parts of the tokens are scored."""

from __future__ import annotations

from pathlib import Path

from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.reference.stage import token_parts


def test_the_parts_of_every_split_are_scored_and_nothing_else(tmp_path: Path) -> None:
    staging = ArtifactStore(Storage(tmp_path)).begin("prepare", "k", "run")
    parts = ["train/0.parquet", "train/1.parquet", "eval_a/0.parquet", "eval_b/0.parquet"]
    entries = [staging.write(name, b"x") for name in ("quarantine/0.parquet", *parts[::-1])]
    rows = {"eval_b/admitted": 1, "eval_a/admitted": 1, "train/admitted": 2, "train/rows_in": 2}
    tokens = Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})
    assert token_parts(tokens) == parts
