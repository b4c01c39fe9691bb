"""Which shards a source names, that every kind of file gives the same rows, and that pieces lose none."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.config.data import DataConfig
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import list_shards, pieces, shard_digest
from dpo_ray.errors import ConfigError
from tests.helpers.shards import FILES, LINES, ROWS, rows_in, rows_of, shards_of
from tests.unit.data.conftest import only_shard

PANDALM = (
    Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parents[4] / "shared/data")) / "pandalm/testset-v1.json.gz"
)


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(FILES[name])
    assert rows_of(tmp_path / name) == ROWS


def text_bytes(batch: list[tuple[int, Any]]) -> int:
    return sum(len(text.encode()) for _, row in batch for text in row.values())


@pytest.mark.parametrize("name", FILES)
def test_batches_are_bounded_by_rows_and_by_bytes(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(FILES[name])
    for max_rows, max_bytes in ((7, 1 << 20), (1000, 1500), (1, 1)):
        batches = [
            batch
            for piece in pieces(only_shard(f"{tmp_path}/{name}"))
            for batch in read_batches(piece, max_rows, max_bytes)
        ]
        assert [row for batch in batches for _, row in batch] == ROWS
        assert [ordinal for batch in batches for ordinal, _ in batch] == list(range(len(ROWS)))
        assert max(map(len, batches)) <= max_rows
        if not name.endswith((".parquet", ".arrow")):  # there the size of a row is a mean
            assert all(len(batch) == 1 or text_bytes(batch) <= 2 * max_bytes for batch in batches)


def test_directory_of_mixed_kinds(tmp_path: Path):
    for name in FILES:
        (tmp_path / name).write_bytes(FILES[name])
    (tmp_path / "dataset_info.json").write_text("{}")
    shards = shards_of(str(tmp_path))
    assert [s.name for s in shards] == sorted(FILES)
    assert all(rows_in(s) == ROWS for s in shards)


@pytest.mark.skipif(not PANDALM.exists(), reason="needs PandaLM's file")
def test_a_published_json_list_is_read_as_it_is():
    assert rows_of(PANDALM) == json.loads(gzip.decompress(PANDALM.read_bytes()))


def test_nested_messages_of_parquet_are_read_without_the_other_columns(tmp_path: Path):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows = [{"chosen": messages, "rejected": messages[:1], "id": 1, "meta": {"a": [1]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "n.parquet")
    assert rows_of(tmp_path / "n.parquet") == [{"chosen": messages, "rejected": messages[:1]}]


def test_saved_dataset_reads_its_data_files_alone(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    home = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(home), num_shards=2)
    (home / "cache-0123.arrow").write_bytes(b"left by a map() over the saved data set")
    shards = shards_of(str(home))
    assert [s.name for s in shards] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [row for s in shards for row in rows_in(s)] == ROWS


def test_saved_dataset_dict_asks_for_a_split(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    some = datasets.Dataset.from_list(ROWS[:3])
    datasets.DatasetDict({"train": some, "test": some}).save_to_disk(str(tmp_path / "all"))
    with pytest.raises(ConfigError, match=r"splits train, test") as caught:
        shards_of(str(tmp_path / "all"))
    assert "all/train" in caught.value.fix
    assert [s.name for s in shards_of(str(tmp_path / "all" / "train"))] == ["data-00000-of-00001.arrow"]


def test_globs_directories_and_lists_in_a_stable_order(tmp_path: Path):
    (tmp_path / "more").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.parquet", "more/d.jsonl.gz", ".hidden.jsonl", "_SUCCESS.json", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    assert [s.name for s in shards_of(str(tmp_path))] == ["a.jsonl", "b.jsonl", "c.parquet", "d.jsonl.gz"]
    assert [s.name for s in shards_of(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    both = [s.name for s in shards_of({"path": [f"{tmp_path}/c.*", f"{tmp_path}/a.jsonl"]})]
    assert both == ["c.parquet", "a.jsonl"]
    mixed = shards_of([f"{tmp_path}/b.jsonl", "synthetic", "hub:someone/pairs"])
    assert [(s.index, s.name, s.kind) for s in mixed] == [
        (0, "b.jsonl", "json"),
        (1, "synthetic", "synthetic"),
        (2, "someone/pairs[train]", "hub"),
    ]


def test_what_is_hidden_is_read_only_where_it_is_named(tmp_path: Path):
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "more/.cache/b.jsonl", "more/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = ["a.jsonl", "b.jsonl"]
    assert [s.name for s in shards_of(str(tmp_path))] == names
    assert [s.name for s in shards_of(f"{tmp_path}/**/*.jsonl")] == names
    assert [s.name for s in shards_of(f"{tmp_path}/.ipynb_checkpoints/*.jsonl")] == ["a-checkpoint.jsonl"]
    assert [s.name for s in shards_of(f"{tmp_path}/more/.cache")] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (("train.jsonl", "test.jsonl"), "test, train"),
        (("train/a.jsonl", "validation/a.jsonl"), "train, validation"),
        (("train-00000-of-00002.parquet", "eval_1.parquet"), "test, train"),
        (("data.train.jsonl", "dev.jsonl", "training.jsonl"), "train, validation"),
        (("rows_train.jsonl", "rows_test.jsonl"), "test, train"),
        (("default/train/0000.parquet", "default/validation/0000.parquet"), "train, validation"),
        (("train/test-cases.jsonl", "train/dev.jsonl", "eval/training.jsonl"), "test, train"),
    ],
)
def test_splits_of_a_directory_are_not_mixed(tmp_path: Path, files: tuple[str, ...], found: str):
    root = tmp_path / "test"  # that a folder above is called so says nothing of the files
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    for path in (str(root), f"{root}/", f"{root}/**", f"file://{root}"):
        with pytest.raises(ConfigError, match=f"belong to the splits {found}, which must not be mixed"):
            shards_of(path)
    train = [name for name in files if "train" in name and not name.startswith("eval/")]
    chosen = shards_of({"path": str(root), "split": "train"})
    assert [s.location for s in chosen] == sorted(str(root / name) for name in train)
    with pytest.raises(ConfigError, match="there is no split "):
        shards_of({"path": str(root), "split": ({"validation", "test"} - set(found.split(", "))).pop()})


def test_a_split_may_be_named_though_the_path_names_it_already(tmp_path: Path):
    root = tmp_path / "data"  # pytest's own folder is named by the test
    for name in ("test/a.jsonl", "dev.jsonl", "b.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    for path, split in (
        ("test", "test"),
        ("test/a.jsonl", "test"),
        ("test/*.jsonl", "test"),
        ("dev.jsonl", "validation"),
    ):
        assert len(shards_of({"path": f"{root}/{path}", "split": split})) == 1
        with pytest.raises(ConfigError, match="there is no split train"):
            shards_of({"path": f"{root}/{path}", "split": "train"})
        assert len(shards_of({"path": f"{root}/{path}"})) == 1  # a path that names one split is enough
    with pytest.raises(ConfigError, match="no name of a file or folder shows a split"):
        shards_of({"path": f"{root}/b.jsonl", "split": "test"})


@pytest.mark.parametrize(
    "files",
    [
        ("a.jsonl", "b.jsonl"),
        ("contest.jsonl", "trainer.jsonl"),
        ("train-1.jsonl", "train-2.jsonl"),
        ("train.jsonl", "more.jsonl"),
    ],
)
def test_files_of_one_split_are_read_together(tmp_path: Path, files: tuple[str, ...]):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert [s.name for s in shards_of(str(tmp_path))] == sorted(files)


def test_a_shard_knows_its_source_and_what_that_says_of_its_rows(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        (tmp_path / name).write_bytes(LINES)
    sources = [
        {"path": f"{tmp_path}/*.jsonl", "format": "scored", "columns": {"prompt": "q"}, "criteria": {"truth": 2.0}},
        {"path": f"{tmp_path}/c.csv", "name": "mine"},
        {"type": "synthetic", "pairs": 3, "name": "reviews"},
    ]
    shards = shards_of(sources)
    assert [(s.index, s.source, s.name) for s in shards] == [
        (0, 0, "a.jsonl"), (1, 0, "b.jsonl"), (2, 1, "mine"), (3, 2, "reviews")
    ]  # fmt: skip
    assert all((s.row_format, s.columns.prompt, s.criteria) == ("scored", "q", {"truth": 2.0}) for s in shards[:2])
    assert [s.row_format for s in shards[2:]] == ["auto", "text"]


@pytest.mark.parametrize("split", ["train", "eval", "eval_mine"])
def test_synthetic_rows_of_every_split(split: str):
    (shard,) = list_shards(split, DataConfig.model_validate({"train": {"type": "synthetic", "pairs": 5}}).train)
    (train,) = list_shards("train", DataConfig.model_validate({"train": {"type": "synthetic", "pairs": 5}}).train)
    assert len(rows_in(shard)) == 5
    assert (rows_in(shard) == rows_in(train)) == (split == "train") == (shard_digest(shard) == shard_digest(train))


def test_the_field_is_named_of_a_set_of_held_out_data():
    sources = DataConfig.model_validate({"train": "gone.jsonl"}).train
    with pytest.raises(ConfigError) as caught:
        list_shards("eval_mine", sources)
    assert caught.value.where == "data.eval.mine=gone.jsonl"


def test_name_that_looks_like_a_glob_is_a_file_first(tmp_path: Path):
    (tmp_path / "rows[1].jsonl").write_bytes(LINES)
    assert rows_of(tmp_path / "rows[1].jsonl") == ROWS


@pytest.mark.parametrize("path", ["nothing-*.jsonl", "gone.jsonl", "empty"])
def test_what_matches_nothing_is_a_config_error(tmp_path: Path, path: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no file matches") as caught:
        shards_of(str(tmp_path / path))
    assert caught.value.where == f"data.train={tmp_path / path}"


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.jsonl.xz", "rows.parquet.gz", "rows"])
def test_unknown_suffix_is_a_config_error(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="kind of file is not known"):
        shards_of(str(tmp_path / name))


def test_unknown_protocol_is_a_config_error():
    with pytest.raises(ConfigError, match="cannot be listed"):
        shards_of("nowhere://bucket/rows.jsonl")


def test_digest_follows_content_and_not_the_name(tmp_path: Path):
    for name, data in (("a.jsonl", LINES), ("b.jsonl", LINES), ("c.jsonl", LINES + b" ")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (shard_digest(only_shard(f"{tmp_path}/{n}.jsonl")) for n in "abc")
    assert a == b != c
    (tmp_path / "a.csv").write_bytes(LINES)
    assert shard_digest(only_shard(f"{tmp_path}/a.csv")) != a  # the same bytes, read otherwise
    hub = [{"type": "hub", "path": "x/y", "revision": r} for r in ("1" * 40, "2" * 40)]
    assert len({shard_digest(s) for s in shards_of([*hub, *hub])}) == 2


def test_digest_of_a_vanished_file_is_a_config_error(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    shard = only_shard(f"{tmp_path}/a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        shard_digest(shard)


def test_local_data_set_of_the_hub_is_read_by_its_columns(tmp_path: Path):
    pytest.importorskip("datasets")
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist([{**row, "id": 3} for row in ROWS]), tmp_path / "pairs/train-0.parquet")
    (shard,) = shards_of({"type": "hub", "path": str(tmp_path / "pairs"), "split": "train[:300]"})
    assert rows_in(shard) == ROWS[:300]
