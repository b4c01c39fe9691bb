"""The stage from a tokens artifact of several splits, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes
from dpo_ray.config.objective import IpoObjective, KtoObjective, ListwiseObjective
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.schemas import TOKENS
from dpo_ray.errors import DataError
from dpo_ray.schedule import stage, usable
from dpo_ray.schedule.files import heldout_splits, read_steps
from tests.helpers.schedules import group_id

TRAIN = TrainConfig(workers=2, groups_per_step=4, tokens_per_micro_batch=40)


def row(number: int, completions: int = 2, pairs: tuple[tuple[int, int], ...] = ((0, 1),)) -> dict[str, Any]:
    return {
        "group_id": group_id(number),
        "source": "made",
        "prompt_ids": [number, 1],
        "completion_ids": [[10 + k, 2] for k in range(completions)],
        "scores": [float(completions - k) for k in range(completions)],
        "chosen": [i for i, _ in pairs],
        "rejected": [j for _, j in pairs],
        "preference_probability": 1.0,
        "weight": 1.0,
    }


def begin(root: Path, what: str) -> Staging:
    return ArtifactStore(Storage(root)).begin(what, "k", "run")


def tokens_of(root: Path, **parts: list[list[dict[str, Any]]]) -> Artifact:
    """Commit a tokens artifact with the parts of each split."""
    staging, entries = begin(root, "prepare"), []
    for split, tables in parts.items():
        for i, rows in enumerate(tables):
            table = pa.Table.from_pylist(rows, schema=TOKENS)
            entries.append(staging.write(f"{split}/{i:05d}.parquet", parquet_bytes(table), rows=len(rows)))
    admitted = {f"{split}/admitted": sum(map(len, tables)) for split, tables in parts.items()}
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=admitted, figures={})


def schedule_of(tokens: Artifact, root: Path, train: TrainConfig = TRAIN, seed: int = 0) -> Artifact:
    return stage.run(tokens, None, train, seed, begin(root, "schedule"), Provenance(1, {}, {}, {}))


def ids_of(schedule: Artifact, split: str) -> list[bytes]:
    batches = [
        m for rank in range(TRAIN.workers) for step in read_steps(schedule, split, rank) for m in step.micro_batches
    ]
    return sorted(i for m in batches if m.weight.any() for i in m.group_ids)


def test_every_split_is_packed(tmp_path: Path) -> None:
    numbers = {"eval_b": range(20, 25), "train": range(10), "eval_a": range(30, 31), "eval_none": range(0)}
    parts = {split: [[row(n) for n in ns]] if ns else [] for split, ns in numbers.items()}
    schedule = schedule_of(tokens_of(tmp_path, **parts), tmp_path)
    for split, ns in numbers.items():
        assert ids_of(schedule, split) == sorted(group_id(n) for n in ns)
    assert heldout_splits(schedule) == ["eval_a", "eval_b"]
    assert schedule.manifest.rows == {
        "train/steps": 3,
        "train/groups": 10,
        "train/bucket_steps": 128,
        "eval_a/steps": 1,
        "eval_a/groups": 1,
        "eval_a/bucket_steps": 128,
        "eval_b/steps": 2,
        "eval_b/groups": 5,
        "eval_b/bucket_steps": 128,
    }


def steps_of(schedule: Artifact, split: str) -> list[list[bytes]]:
    """List the ids of each step's groups, sorted within the step."""
    ranks = [read_steps(schedule, split, rank) for rank in range(TRAIN.workers)]
    return [
        sorted(i for share in shares for m in share.micro_batches if m.weight.any() for i in m.group_ids)
        for shares in zip(*ranks, strict=True)
    ]


def test_the_seed_decides_which_groups_a_step_holds(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, train=[[row(n) for n in range(20)]], eval=[[row(n) for n in range(20, 40)]])
    by_seed = {name: schedule_of(tokens, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))}
    for split in ("train", "eval"):
        a, b, c = (steps_of(by_seed[name], split) for name in "abc")
        assert a == b != c
        assert len(a) == len(c) == 5
        assert sorted(i for step in a for i in step) == sorted(i for step in c for i in step)


def test_held_out_data_without_a_name_is_one_split(tmp_path: Path) -> None:
    schedule = schedule_of(tokens_of(tmp_path, train=[[row(1)]], eval=[[row(2)], [row(3)]]), tmp_path)
    assert heldout_splits(schedule) == ["eval"]
    assert heldout_splits(schedule_of(tokens_of(tmp_path / "none", train=[[row(1)]]), tmp_path / "none")) == []


def test_a_step_weighs_its_pairs(tmp_path: Path) -> None:
    rows = [row(1, 3, ((0, 1), (0, 2), (1, 2))), row(2), row(3, 3, ((0, 2),))]
    schedule = schedule_of(tokens_of(tmp_path, train=[rows]), tmp_path)
    (step,) = read_steps(schedule, "train", 0)
    assert step.step_weight == 5.0
    pairs = [
        (m.group_ids[m.group_index[m.completion_index > 0][2 * i]], int(j - i))
        for rank in range(TRAIN.workers)
        for share in read_steps(schedule, "train", rank)
        for m in share.micro_batches
        if m.weight.any()
        for i, j in zip(m.chosen, m.rejected, strict=True)
    ]  # every completion here has two tokens; its group, and how far below the other one stands
    first, second, third = (group_id(n) for n in (1, 2, 3))
    assert sorted(pairs) == sorted([(first, 1), (first, 2), (first, 1), (second, 1), (third, 2)])


@pytest.mark.parametrize(
    ("without_pairs", "advice", "not_advised"),
    [(1, "unpaired data", "best_worst"), (4, "data.pairing.pairs=best_worst", "unpaired")],
)
def test_groups_without_pairs_are_refused(without_pairs: int, advice: str, not_advised: str, tmp_path: Path) -> None:
    idle = [row(n, without_pairs, ()) for n in range(5, 10)]
    tokens = tokens_of(tmp_path, train=[[row(1)]], eval_lists=[[row(2)], [*idle, row(3)]])
    with pytest.raises(DataError) as refused:
        schedule_of(tokens, tmp_path, TRAIN.model_copy(update={"objective": IpoObjective()}))
    error = refused.value
    assert error.where == "schedule, eval_lists data"
    assert error.what.startswith("5 of 7 groups")
    assert "`ipo`" in error.what
    assert [group_id(n).hex() in error.what for n in range(5, 10)] == [True, True, True, False, False]
    assert advice in error.fix
    assert not_advised not in error.fix


def test_both_kinds_of_groups_without_pairs_get_both_pieces_of_advice(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, train=[[row(1, 1, ()), row(2), row(3, 3, ())]])
    with pytest.raises(DataError, match="2 of 3 groups") as refused:
        schedule_of(tokens, tmp_path)
    assert "best_worst" in refused.value.fix
    assert "unpaired data" in refused.value.fix


def with_another(own: dict[str, Any]) -> dict[str, Any]:
    """Append a completion of another prompt, as `prepare` does for KTO."""
    return own | {"completion_ids": [*own["completion_ids"], [9, 2]], "scores": [*own["scores"], float("nan")]}


def test_a_completion_of_another_prompt_does_not_count_towards_what_an_objective_learns_from(tmp_path: Path) -> None:
    single, pair, unjudged = row(1, 1, ()), row(2), row(3, 2, ())
    kto, ranked = KtoObjective(), ListwiseObjective()
    usable.check_usable(tokens_of(tmp_path / "kto", train=[[with_another(single), with_another(pair), single]]), kto)
    with pytest.raises(DataError, match="1 of 2 groups have no completion with a label"):
        usable.check_usable(tokens_of(tmp_path / "no", train=[[with_another(unjudged), with_another(pair)]]), kto)
    with pytest.raises(DataError, match="no two completions of different scores"):
        usable.check_usable(tokens_of(tmp_path / "list", train=[[with_another(single)]]), ranked)
