"""The reference store: what is a key, what comes back, and what never gets in."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError
from dpo_ray.reference.store import SEGMENT, Numerics, ReferenceStore

NUMERICS = Numerics("vllm", "0.32.0", "cpu", "float32", "float32")
MODEL = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(Storage(tmp_path), MODEL, NUMERICS)


def logps(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def root_of(store: ReferenceStore) -> Path:
    return store.partition.local_path()


def test_what_is_appended_comes_back_by_key(store: ReferenceStore) -> None:
    keys = [store.key([1, 2], [n]) for n in range(5)]
    values = [logps(*(-0.1 * i for i in range(n + 1))) for n in range(5)]
    store.append(keys[:3], values[:3])
    store.append(keys[3:], values[3:])
    index = store.index()
    assert all(k in index for k in keys)
    assert store.key([1, 2], [9]) not in index
    found = index.fetch([keys[4], keys[0], keys[3], keys[0]])
    assert found.keys() == {keys[4], keys[0], keys[3]}
    for key, value in found.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, values[keys.index(key)])


def test_an_index_takes_in_what_it_is_told_of(store: ReferenceStore) -> None:
    index, keys = store.index(), [store.key([1], [n]) for n in range(2)]
    assert keys[0] not in index
    index.add(store.append(keys[:1], [logps(-1)]), keys[:1])
    assert index.fetch(keys[:1])[keys[0]].tolist() == [-1]
    name = store.append(keys[1:], [logps(-2)])
    assert keys[1] not in index
    index.add_segments([name])
    assert index.fetch(keys)[keys[1]].tolist() == [-2]


def test_an_absent_store_is_empty(store: ReferenceStore) -> None:
    assert store.segments() == []
    with pytest.raises(ArtifactError, match="no log-probs for the key"):
        store.index().fetch([bytes(16)])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf"), 0.5, 1e-3])
def test_what_is_no_log_prob_is_refused_whole(wrong: float, store: ReferenceStore) -> None:
    with pytest.raises(ArtifactError, match="no log-probs"):
        store.append([store.key([1], [2]), store.key([1], [3])], [logps(-1), logps(-1, wrong)])
    assert store.segments() == []


def test_a_certain_token_may_round_above_zero(store: ReferenceStore) -> None:
    key = store.key([1], [2])
    store.append([key], [logps(5e-6)])
    assert key in store.index()


def test_keys_of_another_size_are_refused(store: ReferenceStore) -> None:
    with pytest.raises(pa.ArrowInvalid):
        store.append([b"short"], [logps(-1)])
    assert store.segments() == []


def test_the_same_key_in_two_segments_is_fine(store: ReferenceStore) -> None:
    keys = [store.key([1], [n]) for n in range(3)]
    store.append(keys[:2], [logps(-1), logps(-2)])
    store.append(keys[1:], [logps(-2), logps(-3)])
    assert {k: v.tolist() for k, v in store.index().fetch(keys).items()} == dict(
        zip(keys, [[-1.0], [-2.0], [-3.0]], strict=True)
    )


def test_foreign_files_are_not_read(store: ReferenceStore) -> None:
    key = store.key([1], [2])
    store.append([key], [logps(-1)])
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), sink)
    (root_of(store) / "notes.parquet").write_bytes(sink.getvalue())
    (root_of(store) / "README.txt").write_text("what is this")
    (root_of(store) / ".tmp-segment-1.parquet").write_bytes(b"unfinished")
    assert len(store.segments()) == 1
    assert store.index().fetch([key])[key].tolist() == [-1]


def test_unreadable_segments_are_passed_over_with_a_warning(store: ReferenceStore, caplog) -> None:
    keys = [store.key([1], [n]) for n in range(4)]
    whole, torn, emptied, other = (store.append([k], [logps(-1, -2)]) for k in keys)
    path = root_of(store) / torn
    path.write_bytes(path.read_bytes()[:-5])
    (root_of(store) / emptied).write_bytes(b"")
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": [keys[3]], "logps": [[-1.0]]}), sink)
    (root_of(store) / other).write_bytes(sink.getvalue())
    index = store.index()
    assert [k in index for k in keys] == [True, False, False, False]
    assert index.fetch(keys[:1])[keys[0]].tolist() == [-1, -2]
    assert all(name in caplog.text for name in (torn, emptied, other))
    assert whole not in caplog.text


@pytest.mark.parametrize("damage", ["torn", "bit"])
def test_values_that_were_changed_are_an_error_that_says_what_to_do(damage: str, store: ReferenceStore) -> None:
    keys = [store.key([1], [n]) for n in range(50)]
    rng = np.random.default_rng(0)
    name = store.append(keys, [-rng.random(100, dtype=np.float32) for _ in keys])
    index, path = store.index(), root_of(store) / name
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1  # among the values, by far the most of the file
        path.write_bytes(data)
    else:
        path.write_bytes(data[:4])
    with pytest.raises(ArtifactError, match="damaged") as refused:
        index.fetch(keys)
    assert name in refused.value.where
    assert "delete" in refused.value.fix


def test_a_key_is_model_numerics_and_tokens(tmp_path: Path, store: ReferenceStore) -> None:
    key = store.key([1, 2], [3])
    assert len(key) == 16
    fields = ("engine", "version", "device", "dtype")
    numerics = [dataclasses.replace(NUMERICS, **{name: "other"}) for name in fields]
    others = [ReferenceStore(Storage(tmp_path), "b" * 64, NUMERICS)]
    others += [ReferenceStore(Storage(tmp_path), MODEL, n) for n in numerics]
    keys = {key, *(other.key([1, 2], [3]) for other in others)}
    places = {store.partition.uri, *(other.partition.uri for other in others)}
    assert len(keys) == len(places) == 6
    store.append([key], [logps(-1)])
    assert all(other.segments() == [] for other in others)
    # One that begins alike shares the directory's name, and still not the key.
    alike = ReferenceStore(Storage(tmp_path), MODEL[:16] + "c" * 48, NUMERICS)
    assert alike.key([1, 2], [3]) != key


def test_where_the_prompt_ends_is_part_of_the_key(store: ReferenceStore) -> None:
    assert store.key([1, 2], [3]) != store.key([1], [2, 3])
    assert store.key([1, 2, 3], []) != store.key([], [1, 2, 3])
    assert store.key([256], [1]) != store.key([1, 0], [1])


ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(ids, ids, ids, ids)
def test_keys_are_equal_only_for_equal_tokens(a, b, c, d) -> None:
    store = ReferenceStore(Storage("/nowhere"), MODEL, NUMERICS)
    assert (store.key(a, b) == store.key(c, d)) == ((a, b) == (c, d))
    assert store.key(a, b) == store.key(np.array(a, np.int64), np.array(b, np.int32))


def test_the_schema_is_that_of_the_contract(store: ReferenceStore) -> None:
    store.append([bytes(16)], [logps(-1)])
    (name,) = store.segments()
    assert pq.read_schema(root_of(store) / name).equals(SEGMENT)
    assert (root_of(store) / "about.json").read_text().count("vllm") == 1
