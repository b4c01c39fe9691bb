"""Which shards a source names, and that every kind of file gives the same rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.config.data import DataConfig
from dpo_ray.data.rows import read_rows
from dpo_ray.data.sources import list_shards, shard_digest
from dpo_ray.errors import ConfigError

from .conftest import only_shard

ROWS = [{"prompt": f"p{i}", "chosen": "é" * i + "a", "rejected": "b"} for i in range(600)]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()


def shards_of(train: object) -> list:
    return list_shards("train", DataConfig.model_validate({"train": train}).train)


def rows_of(path: Path, **source: object) -> list:
    return [row for _, row in read_rows(only_shard(str(path), **source))]


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


WRITERS = {
    "a.jsonl": lambda p: p.write_bytes(LINES),
    "crlf.jsonl": lambda p: p.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "bom.json": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES),
    "unended.jsonl": lambda p: p.write_bytes(LINES.rstrip()),
    "blank-lines.jsonl": lambda p: p.write_bytes(LINES.replace(b"\n", b"\n\n  \n")),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    "members.json.gz": lambda p: p.write_bytes(gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:])),
    "a.jsonl.zst": lambda p: p.write_bytes(pa.compress(LINES, "zstd", asbytes=True)),
    "frames.json.zst": lambda p: p.write_bytes(
        b"".join(pa.compress(x, "zstd", asbytes=True) for x in (LINES[:999], LINES[999:]))
    ),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p, row_group_size=70),
    "file.arrow": write_arrow_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str):
    WRITERS[name](tmp_path / name)
    assert rows_of(tmp_path / name) == ROWS


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
    assert [row for s in shards for _, row in read_rows(s)] == ROWS


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
        (0, "b.jsonl", "jsonl"),
        (1, "synthetic", "synthetic"),
        (2, "someone/pairs[train]", "hub"),
    ]


def test_name_that_looks_like_a_glob_is_a_file_first(tmp_path: Path):
    (tmp_path / "rows[1].jsonl").write_bytes(LINES)
    assert rows_of(tmp_path / "rows[1].jsonl") == ROWS


@pytest.mark.parametrize("path", ["nothing-*.jsonl", "gone.jsonl", "empty"])
def test_what_matches_nothing_is_a_config_error(tmp_path: Path, path: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no file matches") as caught:
        shards_of(str(tmp_path / path))
    assert caught.value.where == f"data.train={tmp_path / path}"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.xz", "rows"])
def test_unknown_suffix_is_a_config_error(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="not a kind of file"):
        shards_of(str(tmp_path / name))


def test_unknown_protocol_is_a_config_error():
    with pytest.raises(ConfigError, match="cannot be listed"):
        shards_of("nowhere://bucket/rows.jsonl")


def test_digest_follows_content_and_not_the_name(tmp_path: Path):
    for name, data in (("a.jsonl", LINES), ("b.jsonl", LINES), ("c.jsonl", LINES + b" ")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (shard_digest(only_shard(f"{tmp_path}/{n}.jsonl")) for n in "abc")
    assert a == b != c
    hub = [{"type": "hub", "name": "x/y", "revision": r} for r in ("1" * 40, "2" * 40)]
    assert len({shard_digest(s) for s in shards_of([*hub, *hub])}) == 2


def test_digest_of_a_vanished_file_is_a_config_error(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    shard = only_shard(f"{tmp_path}/a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        shard_digest(shard)
