"""What `store stats` and `store verify` say of sound and of damaged stores."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.storage import Storage
from dpo_ray.reference.store import care
from dpo_ray.reference.store.care import differing, last_used_unix_seconds, stats, verify
from dpo_ray.reference.store.store import SEGMENT, Numerics, ReferenceStore

NUMERICS = Numerics("vllm", "0.32.0", "cpu", "float32", "float32")


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(Storage(tmp_path / "store"), "a" * 64, NUMERICS)


def append(store: ReferenceStore, numbers: range | list[int], value: float = -1.0, tokens: int = 3) -> str:
    return store.append(
        [store.key([1], [n]) for n in numbers], [np.full(tokens, value - n, np.float32) for n in numbers]
    )


def path_of(store: ReferenceStore, name: str) -> Path:
    return store.partition.local_path(name)


def put_table(store: ReferenceStore, name: str, table: pa.Table) -> None:
    """Replace a segment by a sound Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    path_of(store, name).write_bytes(sink.getvalue())


def faults_of(store: ReferenceStore) -> list[tuple[str, str]]:
    return [(fault.where.removeprefix(f"{store.partition.uri}/"), fault.what) for fault in verify(store.root)]


def test_stats_count_what_was_appended(store: ReferenceStore) -> None:
    other = dataclasses.replace(store, model_digest="b" * 64, numerics=dataclasses.replace(NUMERICS, dtype="bfloat16"))
    append(store, range(5))
    append(store, range(5, 7), tokens=10)
    append(other, range(2))
    (store.root.local_path() / "notes").mkdir()
    first, second = stats(store.root)
    assert (first.partition, first.model_digest, first.numerics) == (
        store.partition.uri.rpartition("/")[2],
        "a" * 64,
        NUMERICS.tag(),
    )
    assert (first.segments, first.sequences, first.tokens, first.damaged_segments) == (2, 7, 5 * 3 + 2 * 10, 0)
    assert first.bytes == sum(path_of(store, name).stat().st_size for name in store.segments())
    assert time.time() - 60 < (first.used_unix_seconds or 0) <= time.time()
    assert (second.segments, second.sequences, second.tokens) == (1, 2, 6)
    assert second.numerics["dtype"] == "bfloat16"


def test_stats_of_a_damaged_store(store: ReferenceStore) -> None:
    append(store, range(5))
    torn = path_of(store, append(store, range(5, 7)))
    torn.write_bytes(torn.read_bytes()[:-1])
    path_of(store, "about.json").write_text("{")
    (found,) = stats(store.root)
    assert (found.segments, found.sequences, found.damaged_segments) == (2, 5, 1)
    assert (found.model_digest, found.numerics) == ("", {})


def test_an_absent_store_has_no_partitions(tmp_path: Path) -> None:
    assert stats(Storage(tmp_path / "none")) == []
    assert list(verify(Storage(tmp_path / "none"))) == []


def test_last_use_is_the_mark_or_the_newest_segment(store: ReferenceStore) -> None:
    assert last_used_unix_seconds(store.partition) is None
    append(store, [1])
    store.partition.write("used.json", b'{"unix_seconds": 5}')
    assert time.time() - 60 < (last_used_unix_seconds(store.partition) or 0) <= time.time()
    store.partition.write("used.json", b'{"unix_seconds": 9999999999}')
    assert last_used_unix_seconds(store.partition) == 9999999999


def test_a_sound_store_has_no_faults_and_is_not_changed(store: ReferenceStore) -> None:
    append(store, range(5))
    append(store, range(3, 9))  # duplicates that agree
    append(store, [])
    before = {p: p.stat().st_mtime_ns for p in sorted(store.root.local_path().rglob("*"))}
    assert list(verify(store.root)) == []
    assert {p: p.stat().st_mtime_ns for p in sorted(store.root.local_path().rglob("*"))} == before


def test_every_damaged_segment_is_named_with_what_is_wrong(store: ReferenceStore) -> None:
    torn, turned, foreign, infinite, null, narrow, sound = (append(store, range(9 * n, 9 * n + 9)) for n in range(7))
    path = path_of(store, torn)
    path.write_bytes(path.read_bytes()[:-1])
    data = bytearray(path_of(store, turned).read_bytes())
    column = pq.read_metadata(path_of(store, turned)).row_group(0).column(1)
    data[column.data_page_offset + column.total_compressed_size - 2] ^= 4
    path_of(store, turned).write_bytes(data)
    put_table(store, foreign, pa.table({"x": [1]}))
    put_table(store, infinite, pa.table({"key": [bytes(16)], "token_logps": [[float("-inf")]]}, schema=SEGMENT))
    put_table(store, null, pa.table({"key": [bytes(16)], "token_logps": [None]}, schema=SEGMENT))
    narrow_schema = pa.schema([("key", pa.binary(8)), SEGMENT.field("token_logps")])
    put_table(store, narrow, pa.table({"key": [bytes(8)], "token_logps": [[-1.0]]}, schema=narrow_schema))
    found = dict(faults_of(store))
    assert found.keys() == {torn, turned, foreign, infinite, null, narrow}
    assert sound not in found
    assert "checksum" in found[turned]
    assert "columns" in found[foreign]
    assert "cannot be log-probs" in found[infinite]
    assert "missing" in found[null]
    assert "columns" in found[narrow]


@pytest.mark.parametrize("text", ["{", "[]", '{"model_digest": 1, "numerics": {}}', '{"numerics": {}}'])
def test_a_damaged_description_is_a_fault(text: str, store: ReferenceStore) -> None:
    append(store, [1])
    path_of(store, "about.json").write_text(text)
    ((name, what),) = faults_of(store)
    assert name == "about.json"
    assert "damaged" in what


def test_a_description_of_another_partition_is_a_fault(store: ReferenceStore) -> None:
    append(store, [1])
    about = json.loads(path_of(store, "about.json").read_text())
    about["numerics"]["dtype"] = "bfloat16"
    path_of(store, "about.json").write_text(json.dumps(about))
    assert faults_of(store) == [("about.json", "the file describes another partition")]


@pytest.mark.parametrize(
    ("dtype", "off", "is_fault"),
    [("float32", 9e-5, False), ("float32", 2e-4, True), ("bfloat16", 0.4, False), ("bfloat16", 0.6, True)],
)
def test_duplicates_must_agree(dtype: str, off: float, is_fault: bool, tmp_path: Path) -> None:
    store = ReferenceStore(Storage(tmp_path), "a" * 64, dataclasses.replace(NUMERICS, dtype=dtype))
    first = append(store, range(4))
    second = append(store, range(2, 6), value=-1.0 - off)
    third = append(store, range(4, 6), value=-1.0 - off)  # agrees with the second
    what = f"2 sequences of this file have other log-probs in {first}"
    assert faults_of(store) == ([(second, what)] if is_fault else [])
    assert third not in str(faults_of(store))


def test_duplicates_of_other_lengths_contradict_each_other(store: ReferenceStore, monkeypatch) -> None:
    monkeypatch.setattr(care, "COMPARED_AT_ONCE", 3)
    first = append(store, range(10), tokens=3)
    second = append(store, range(10), tokens=4)
    assert faults_of(store) == [(second, f"10 sequences of this file have other log-probs in {first}")]


lists = st.lists(st.lists(st.sampled_from([0.0, -0.4, -1.0]), max_size=3), max_size=6)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(lists, lists, st.integers(0, 2))
def test_lists_differ_by_length_or_value(some, others, skipped: int) -> None:
    count = min(len(some), len(others))
    columns = [pa.array(x[:count], pa.list_(pa.float32())).slice(skipped) for x in (some, others)]
    expected = [
        len(a) != len(b) or any(abs(x - y) > 0.5 for x, y in zip(a, b, strict=True))
        for a, b in list(zip(some[:count], others[:count], strict=True))[skipped:]
    ]
    assert differing(*columns, 0.5).tolist() == expected
