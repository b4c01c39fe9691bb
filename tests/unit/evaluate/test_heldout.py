"""Held-out data in named sets: figures of each beside those of all, and prompts dealt evenly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.evaluate import stage
from dpo_ray.evaluate.metrics import heldout_by_set, heldout_figures
from dpo_ray.evaluate.stage import heldout_prompts
from dpo_ray.models.builtin import builtin_model
from dpo_ray.train.evaluation import HELDOUT

ACCURATE = {"eval_a": [1, 1, 0, 1], "eval_b": [0, 0], "eval_c": [1]}
WEIGHT = {"eval_a": 1.0, "eval_b": 2.0, "eval_c": 0.5}


def pairs(splits: dict[str, str]) -> pa.Table:
    """Lay out held-out pairs; `splits` renames."""
    rows = [
        dict.fromkeys(HELDOUT, 0.25) | {"split": splits.get(s, s), "accurate": float(a), "weight": WEIGHT[s]}
        for s, accurate in ACCURATE.items()
        for a in accurate
    ]
    return pa.Table.from_pylist(rows)


def test_sets_are_measured_apart() -> None:
    table = pairs({})
    by_set = heldout_by_set(table)
    assert {name: f["pairs"] for name, f in by_set.items()} == {"a": 4, "b": 2, "c": 1}
    assert {name: f["rewards/accuracies"] for name, f in by_set.items()} == {"a": 0.75, "b": 0.0, "c": 1.0}
    assert heldout_figures(table)["pairs"] == 7
    assert heldout_figures(table)["rewards/accuracies"] == pytest.approx(3.5 / 8.5)


def test_without_names_there_are_no_sets() -> None:
    assert heldout_by_set(pairs(dict.fromkeys(ACCURATE, "eval"))) == {}


def test_unpaired_data_is_measured_by_label_and_has_no_accuracy() -> None:
    nan = float("nan")
    blank = dict.fromkeys(HELDOUT, nan) | {"split": "eval", "loss": 0.5}
    rows = [
        blank | {"reward_chosen": 1.0, "weight": 1.0},
        blank | {"reward_chosen": 2.0, "weight": 3.0},
        blank | {"reward_rejected": -0.5, "weight": 2.0},
    ]
    expected = {
        "completions": 3,
        "loss": 0.5,
        "rewards/chosen": 1.75,
        "rewards/rejected": -0.5,
        "rewards/margins": 2.25,
    }
    assert heldout_figures(pa.Table.from_pylist(rows)) == expected
    assert heldout_figures(pa.Table.from_pylist(rows[:2])) == {
        "completions": 2,
        "loss": 0.5,
        "rewards/chosen": 1.75,  # without an undesirable completion there is no margin
    }
    assert heldout_figures(pa.Table.from_pylist(rows[2:])) == {"completions": 1, "loss": 0.5, "rewards/rejected": -0.5}


def artifact_of(root: Path, files: dict[str, pa.Table], rows: dict[str, int]) -> Artifact:
    staging = ArtifactStore(Storage(root)).begin("made", "k", "run")
    entries = [staging.write(name, parquet_bytes(table), rows=len(table)) for name, table in files.items()]
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})


@pytest.mark.parametrize("named", [True, False])
def test_the_artifact_says_sets_only_where_there_are_some(named: bool, tmp_path: Path) -> None:
    table = pairs({} if named else dict.fromkeys(ACCURATE, "eval"))
    trained = artifact_of(tmp_path, {"heldout.parquet": table}, {})
    staging = ArtifactStore(Storage(tmp_path)).begin("evaluate", "k", "run")
    tokenizer = load_tokenizer(str(builtin_model("sentiment_llama")))
    figures = stage.run(trained, None, None, tokenizer, staging, Provenance(1, {}, {}, {})).manifest.figures
    assert figures["heldout"] == heldout_figures(table)
    assert figures.get("heldout_sets") == (heldout_by_set(table) if named else None)


def prompts_of(root: Path, **splits: list[list[int]]) -> Artifact:
    """Commit tokens with prompts alone; a split's prompts lie in parts of two."""
    files = {}
    for split, prompts in splits.items():
        for at in range(0, len(prompts), 2):
            column = pa.array(prompts[at : at + 2], pa.list_(pa.int32()))
            files[f"{split}/{at:05d}.parquet"] = pa.table({"prompt_ids": column})
    return artifact_of(root, files, {f"{split}/admitted": len(prompts) for split, prompts in splits.items()})


def test_prompts_are_dealt_evenly_over_the_sets(tmp_path: Path) -> None:
    tokens = prompts_of(
        tmp_path,
        train=[[9]],
        eval_a=[[1], [2], [3], [4], [5]],
        eval_b=[[6]],
        eval_c=[[1], [7, 7, 7], [8], [1], [2]],
        eval_d=[],
    )
    in_turns = [[1], [6], [7, 7, 7], [2], [8], [3], [4], [5]]  # the same prompt in two sets is one
    assert [heldout_prompts(tokens, n, None) for n in range(10)] == [in_turns[:n] for n in range(10)]
    assert heldout_prompts(tokens, 4, 2) == [[1], [6], [8], [2]]


def test_prompts_of_one_set_come_in_order(tmp_path: Path) -> None:
    tokens = prompts_of(tmp_path, train=[[9]], eval=[[3], [1], [3], [2, 2], [4]])
    assert heldout_prompts(tokens, 3, None) == [[3], [1], [2, 2]]
    assert heldout_prompts(tokens, 9, 1) == [[3], [1], [4]]


def test_what_the_workers_write_is_what_is_read() -> None:
    from dpo_ray.train.worker import heldout_pairs

    rng = np.random.default_rng(0)
    tables = {"eval_a": rng.random((3, len(HELDOUT))), "eval_b": rng.random((2, len(HELDOUT)))}
    table = heldout_pairs(tables)
    assert table["split"].to_pylist() == ["eval_a"] * 3 + ["eval_b"] * 2
    by_set = heldout_by_set(table)
    for name, values in tables.items():
        column = dict(zip(HELDOUT, values.T, strict=True))
        weight = column["weight"] / column["weight"].sum()
        assert by_set[name.removeprefix("eval_")]["loss"] == pytest.approx((column["loss"] * weight).sum())
