"""The account of a stage: duplicates, parts that are rewritten, the same bytes again, and nothing admitted."""

from __future__ import annotations

import pickle  # noqa: TID251 (what Ray does with arguments)

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.data import DataConfig
from dpo_ray.data.sources import list_shards
from dpo_ray.data.stage import PrepareTask, prepare_shard, quarantine_examples
from dpo_ray.errors import DataError

from .conftest import CHATML


def rows(*numbers: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}.", "chosen": " good", "rejected": " bad"} for i in numbers]


def test_duplicates_in_a_part_across_parts_and_across_shards(prepare, jsonl):
    jsonl(rows(0, 0, 1, 1, 2, 0), "a.jsonl")  # parts of two rows: 0 0 | 1 1 | 2 0
    b = jsonl(rows(2, 3), "b.jsonl")
    prepared = prepare([b.replace("b.jsonl", "a.jsonl"), b], rows_per_part=2)
    assert prepared.rows["train/rows_in"] == 8
    assert prepared.rows["train/duplicates"] == 4
    assert prepared.artifact.names("train/") == [
        "train/00000-00000.parquet",
        "train/00000-00001.parquet",
        "train/00000-00002.parquet",
        "train/00001-00000.parquet",
    ]
    assert [prepared.artifact.entry(n).rows for n in prepared.artifact.names("train/")] == [1, 1, 1, 1]
    assert [g["source"] for g in prepared.groups()] == ["a.jsonl"] * 3 + ["b.jsonl"]
    assert len({g["group_id"] for g in prepared.groups()}) == 4
    accounts = prepared.artifact.manifest.figures["accounts"]
    assert [(a["rows_in"], a["admitted"], a["duplicates"]) for a in accounts] == [(6, 3, 3), (2, 1, 1)]


def test_part_of_duplicates_alone_is_not_listed(prepare, jsonl):
    path = jsonl(rows(0, 1), "a.jsonl")
    prepared = prepare([path, path])
    assert prepared.artifact.names("train/") == ["train/00000-00000.parquet"]
    assert prepared.rows["train/duplicates"] == 2


def test_train_and_eval_are_told_apart(prepare, jsonl):
    path = jsonl(rows(0, 1, 1))
    prepared = prepare(path, eval=path)
    assert [prepared.rows[f"{s}/admitted"] for s in ("train", "eval")] == [2, 2]
    assert [g["group_id"] for g in prepared.groups("train")] == [g["group_id"] for g in prepared.groups("eval")]


def test_reversed_preference_and_other_prompt_are_no_duplicates(prepare, jsonl):
    one = rows(0)[0]
    swapped = {**one, "chosen": one["rejected"], "rejected": one["chosen"]}
    assert prepare(jsonl([one, swapped, *rows(1)])).rows["train/duplicates"] == 0


def test_preparing_again_writes_the_same_bytes(prepare, jsonl):
    path = jsonl([*rows(*range(20)), b"not JSON", *rows(3)])
    first, second = prepare(path, rows_per_part=6), prepare(path, rows_per_part=6)
    assert first.parts == second.parts
    assert len(first.parts) == 4 + 1 + 1  # parts, one quarantine file, the account


def test_task_pickles_and_repeats_over_its_own_files(tmp_path, builtin_dir, jsonl):
    staging = ArtifactStore(Storage(tmp_path / "artifacts")).begin("prepare", "k", "test")
    config = DataConfig.model_validate({"train": jsonl(rows(*range(5))), "rows_per_part": 2})
    task = PrepareTask(builtin_dir, "plain", config, staging)
    (shard,) = list_shards("train", config.train)
    blocks = prepare_shard(shard, task)
    next(blocks)  # a task that dies after its first part
    blocks.close()
    sent_shard, sent_task = pickle.loads(pickle.dumps((shard, task)))  # noqa: S301
    tables = list(prepare_shard(sent_shard, sent_task))
    assert [len(t) for t in tables] == [2, 2, 1]
    assert len(set(map(lambda t: t.schema, tables))) == 1  # noqa: C417
    assert len(staging.storage.file_sizes()) == 4


def test_empty_shard_gives_a_block_with_the_schema(tmp_path, builtin_dir, jsonl):
    staging = ArtifactStore(Storage(tmp_path / "artifacts")).begin("prepare", "k", "test")
    config = DataConfig.model_validate({"train": [jsonl([], "a.jsonl"), jsonl(rows(0), "b.jsonl")]})
    task = PrepareTask(builtin_dir, "plain", config, staging)
    empty, full = ([*prepare_shard(s, task)] for s in list_shards("train", config.train))
    assert [len(t) for t in empty] == [0]
    assert empty[0].schema == full[0].schema


def test_nothing_admitted_lists_the_reasons(prepare, jsonl):
    path = jsonl([b"x", b"y", {"prompt": "p"}])
    with pytest.raises(DataError) as caught:
        prepare(path)
    assert caught.value.where == "data.train"
    assert "none of 3 rows" in caught.value.what
    assert "2 JSON_SYNTAX (the line is not JSON); 1 MISSING_CHOSEN" in caught.value.what
    with pytest.raises(DataError, match="the data is empty"):
        prepare(jsonl([], "empty.jsonl"))
    with pytest.raises(DataError, match=r"data\.eval: none of 3 rows"):
        prepare(jsonl(rows(0), "sound.jsonl"), eval=path)


def test_examples_for_the_report(prepare, jsonl):
    prepared = prepare(jsonl([b"x", *rows(0), b"y", {"prompt": "p"}]), rows_per_part=2)
    examples = quarantine_examples(prepared.artifact)
    assert {reason: [e["ordinal"] for e in es] for reason, es in examples.items()} == {
        "JSON_SYNTAX": [0],
        "MISSING_CHOSEN": [3],
    }


def test_auto_template_is_the_tokenizers_own(prepare, jsonl, chatml_dir):
    path = jsonl(rows(0))
    by_name = prepare(path, tokenizer_dir=chatml_dir, template="auto").groups()
    by_text = prepare(path, tokenizer_dir=chatml_dir, template=CHATML).groups()
    assert by_name == by_text


def test_synthetic_pairs_are_all_admitted(prepare):
    prepared = prepare({"type": "synthetic", "pairs": 60}, eval={"type": "synthetic", "pairs": 20})
    assert prepared.reasons() == []
    assert prepared.rows["eval/rows_in"] == 20
    prompts = [{tuple(g["prompt_ids"]) for g in prepared.groups(s)} for s in ("train", "eval")]
    assert not prompts[0] & prompts[1]
