"""The account of a stage: duplicates, parts that are rewritten, the same bytes again, and nothing admitted."""

from __future__ import annotations

import pickle  # noqa: TID251 (what Ray does with arguments)

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.data import DataConfig
from dpo_ray.data.first_pass import PrepareTask, prepare_piece
from dpo_ray.data.second_pass import check_quarantined
from dpo_ray.data.sources import Piece, list_shards
from dpo_ray.errors import DataError
from dpo_ray.report.samples import quarantine_examples
from tests.unit.data.conftest import CHATML


def rows(*numbers: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}.", "chosen": " good", "rejected": " bad"} for i in numbers]


def test_duplicates_in_a_part_across_parts_and_across_shards(prepare, jsonl):
    jsonl(rows(0, 0, 1, 1, 2, 0), "a.jsonl")  # parts of two rows: 0 0 | 1 1 | 2 0
    b = jsonl(rows(2, 3), "b.jsonl")
    prepared = prepare([b.replace("b.jsonl", "a.jsonl"), b], rows_per_part=2)
    assert prepared.rows["train/rows_in"] == 8
    assert prepared.rows["train/duplicates"] == 4
    assert prepared.artifact.names("train/") == [
        "train/00000-00000-00000.parquet",
        "train/00000-00000-00001.parquet",
        "train/00000-00000-00002.parquet",
        "train/00001-00000-00000.parquet",
    ]
    assert [prepared.artifact.entry(n).rows for n in prepared.artifact.names("train/")] == [1, 1, 1, 1]
    assert [g["source"] for g in prepared.groups()] == ["a.jsonl"] * 3 + ["b.jsonl"]
    assert len({g["group_id"] for g in prepared.groups()}) == 4
    accounts = prepared.artifact.manifest.figures["accounts"]
    assert [(a["rows_in"], a["admitted"], a["duplicates"]) for a in accounts] == [(6, 3, 3), (2, 1, 1)]


def test_part_of_duplicates_alone_is_not_listed(prepare, jsonl):
    path = jsonl(rows(0, 1), "a.jsonl")
    prepared = prepare([path, path])
    assert prepared.artifact.names("train/") == ["train/00000-00000-00000.parquet"]
    assert prepared.rows["train/duplicates"] == 2


def test_train_and_eval_are_told_apart(prepare, jsonl):
    path = jsonl(rows(0, 1, 1))
    prepared = prepare(path, eval=path, rules={"leakage": "keep"})
    assert [prepared.rows[f"{s}/admitted"] for s in ("train", "eval")] == [2, 2]
    assert [g["group_id"] for g in prepared.groups("train")] == [g["group_id"] for g in prepared.groups("eval")]


def test_a_preference_and_its_opposite_are_both_left_out(prepare, jsonl):
    one = rows(0)[0]
    swapped = {**one, "chosen": one["rejected"], "rejected": one["chosen"]}
    path = jsonl([one, swapped, *rows(1)])
    prepared = prepare(path)
    assert prepared.rows["train/duplicates"] == 0
    assert prepared.reasons() == ["CONFLICTING_PAIR"] * 2
    assert len(prepare(path, rules={"conflicts": "keep"}).groups()) == 3


def test_a_prompt_of_held_out_data_is_kept_out_of_training(prepare, jsonl):
    held_out = [{**rows(1)[0], "chosen": " fine"}]  # another answer to the same prompt
    prepared = prepare(jsonl(rows(0, 1, 2)), eval={"a": jsonl(held_out, "a.jsonl"), "b": jsonl(rows(7), "b.jsonl")})
    assert prepared.reasons() == ["LEAKED_PROMPT"]
    assert [q["ordinal"] for q in prepared.quarantined()] == [1]
    assert [prepared.rows[f"{s}/admitted"] for s in ("train", "eval_a", "eval_b")] == [2, 1, 1]


def test_weights_and_caps_mix_sources(prepare, jsonl):
    a, b = jsonl(rows(*range(10)), "a.jsonl"), jsonl(rows(*range(10, 16)), "b.jsonl")
    mixed = prepare([{"path": a, "weight": 2, "name": "first"}, {"path": b, "weight": 1, "max_groups": 4}])
    accounts = mixed.artifact.manifest.figures["accounts"]
    assert [(x["source"], x["admitted"], x["reasons"]) for x in accounts] == [
        ("first", 8, {"OUTSIDE_MIXTURE": 2}),
        ("b.jsonl", 4, {"OVER_CAP": 2}),
    ]
    assert {g["source"] for g in mixed.groups()} == {"first", "b.jsonl"}


def test_a_new_shard_does_not_change_what_a_cap_takes_of_the_old(prepare, jsonl):
    a, b = jsonl(rows(*range(20)), "a.jsonl"), jsonl(rows(*range(20, 40)), "b.jsonl")
    before = prepare({"path": a, "max_groups": 5}).groups()
    after = prepare({"path": [a, b], "max_groups": 5}).groups()
    ids = sorted(g["group_id"] for g in after)
    assert [g["group_id"] for g in after if g["source"] == "a.jsonl"] == [
        g["group_id"] for g in before if g["group_id"] in ids
    ]
    assert len(ids) == 5


def test_unsound_rows_over_the_limit_stop_and_rules_do_not_count(prepare, jsonl):
    path = jsonl([b"x", *rows(*range(49)), *[{**rows(i)[0], "chosen": " bad"} for i in (90, 91)]])
    tokens = prepare(path).artifact
    with pytest.raises(DataError) as caught:
        check_quarantined(tokens, 0.05)
    assert caught.value.where == "data.train"
    assert "3 of 52 rows (5.8%) are unsound, more than the allowed 5.0%: 2 IDENTICAL_PAIR" in caught.value.what
    check_quarantined(tokens, 3 / 52)
    with pytest.raises(DataError, match=r"data\.eval\.one: 1 of 2 rows"):
        check_quarantined(
            prepare(jsonl(rows(*range(9))), eval={"one": jsonl([b"x", *rows(7)], "e.jsonl")}).artifact, 0.4
        )


def test_rows_that_rules_leave_out_are_not_unsound(prepare, jsonl):
    long = {**rows(0)[0], "chosen": " good" * 200}
    prepared = prepare(jsonl([long, *rows(1)]), truncation="drop", max_length_tokens=64)
    assert prepared.reasons() == ["TOO_LONG"]
    check_quarantined(prepared.artifact, 0.0)


def test_preparing_again_writes_the_same_bytes(prepare, jsonl):
    path = jsonl([*rows(*range(20)), b"not JSON", *rows(3)])
    first, second = prepare(path, rows_per_part=6), prepare(path, rows_per_part=6)
    assert first.parts == second.parts
    assert len(first.parts) == 4 + 1  # parts, one quarantine file


def test_task_pickles_and_repeats_over_its_own_files(tmp_path, builtin_dir, jsonl):
    staging = ArtifactStore(Storage(tmp_path / "artifacts")).begin("shard", "k", "test")
    config = DataConfig.model_validate({"train": jsonl(rows(*range(5))), "rows_per_part": 2})
    task = PrepareTask(builtin_dir, "plain", config)
    (shard,) = list_shards("train", config.train)
    parts = prepare_piece(Piece(shard), staging, task)
    first = next(parts)  # a task that dies after its first part
    parts.close()
    sent = pickle.loads(pickle.dumps((Piece(shard), staging, task)))  # noqa: S301
    again = list(prepare_piece(*sent))
    assert [p.groups for p in again] == [2, 2, 1]
    assert again[0] == first
    assert len(staging.storage.file_sizes()) == 3


def test_nothing_admitted_lists_the_reasons(prepare, jsonl):
    path = jsonl([b"x", b"y", {"prompt": "p", "rejected": "r"}])
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
    prepared = prepare(jsonl([b"x", *rows(0), b"y", {"prompt": "p", "rejected": "r"}]), rows_per_part=2)
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
