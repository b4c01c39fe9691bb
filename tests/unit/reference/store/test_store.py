"""The reference store: what is a key, what comes back, and what never gets in."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import pickle  # noqa: TID251 (what Ray does with arguments)
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError, InfrastructureError
from dpo_ray.reference.store import segment
from dpo_ray.reference.store import store as store_module
from dpo_ray.reference.store.segment import read_whole
from dpo_ray.reference.store.store import KEY, SEGMENT, Numerics, ReferenceStore

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
    assert index.find([*keys, store.key([1, 2], [9])]).tolist() == [True] * 5 + [False]
    found = store.fetch(index, [keys[4], keys[0], keys[3], keys[0]])
    assert found.type == pa.list_(pa.float32())
    assert [value.as_py() for value in found] == [values[n].tolist() for n in (4, 0, 3, 0)]
    assert store.fetch(index, []).to_pylist() == []


def test_an_index_of_an_older_state_is_brought_up_to_date(store: ReferenceStore) -> None:
    keys = [store.key([1], [n]) for n in range(3)]
    store.append(keys[:2], [logps(-1), logps(-2)])
    before = store.index()
    name = store.append(keys[1:], [logps(-9), logps(-3)])
    assert before.find(keys).tolist() == [True, True, False]
    for index in (store.index(known=before), store.index(), before.joined(store.index([name]))):
        assert index.segments == (*before.segments, name)
        assert len(index) == 3
        assert store.fetch(index, keys).to_pylist() == [[-1], [-2], [-3]]
    assert store.index([name]).find(keys).tolist() == [False, True, True]


def test_a_whole_column_is_appended_as_it_is(store: ReferenceStore) -> None:
    keys = np.frombuffer(bytes(range(64)), KEY)
    column = pa.array([[-9.0], [-1.0, -2.0], [], [-3.0], [-4.0]], pa.list_(pa.float32()))[1:]
    store.append(keys, column)
    assert store.fetch(store.index(), keys[::-1]).to_pylist() == [[-4.0], [-3.0], [], [-1.0, -2.0]]


def test_an_absent_store_is_empty(store: ReferenceStore) -> None:
    assert store.segments() == []
    with pytest.raises(ArtifactError, match="no log-probs for the key"):
        store.fetch(store.index(), [bytes(16)])
    assert not root_of(store).exists()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf"), 0.5, 1e-3])
def test_what_is_no_log_prob_is_refused_whole(wrong: float, store: ReferenceStore) -> None:
    with pytest.raises(ArtifactError, match="cannot be log-probs"):
        store.append([store.key([1], [2]), store.key([1], [3])], [logps(-1), logps(-1, wrong)])
    assert store.segments() == []


def test_a_certain_token_may_round_above_zero(store: ReferenceStore) -> None:
    key = store.key([1], [2])
    store.append([key], [logps(5e-6)])
    assert store.index().find([key]).all()


def test_keys_of_another_size_are_refused(store: ReferenceStore) -> None:
    for keys in ([b"short"], [bytes(16), bytes(17)], np.zeros(2, "S16"), np.zeros((1, 2), KEY)):
        with pytest.raises(ValueError, match="key"):
            store.append(keys, [logps(-1)] * len(keys))
    with pytest.raises(ValueError, match="length"):
        store.append([bytes(16)], [logps(-1), logps(-2)])
    assert store.segments() == []


def test_of_a_key_in_two_segments_the_oldest_counts(store: ReferenceStore) -> None:
    keys = [store.key([1], [n]) for n in range(3)]
    store.append(keys[:2], [logps(-1), logps(-2)])
    store.append(keys[1:], [logps(-2.5), logps(-3)])
    assert len(store.index()) == 3
    assert store.fetch(store.index(), keys).to_pylist() == [[-1], [-2], [-3]]


def test_foreign_files_are_passed_over_with_a_warning_each(store: ReferenceStore, caplog) -> None:
    key = store.key([1], [2])
    store.append([key], [logps(-1)])
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), sink)
    (root_of(store) / "notes.parquet").write_bytes(sink.getvalue())
    (root_of(store) / "README.txt").write_text("what is this")
    (root_of(store) / ".tmp-segment-1.parquet").write_bytes(b"unfinished")
    (root_of(store) / "segment-copies").mkdir()
    (root_of(store) / "segment-copies" / store.segments()[0]).write_bytes(b"")
    assert len(store.segments()) == 1
    assert store.fetch(store.index(), [key]).to_pylist() == [[-1]]
    assert [sum(name in m for m in caplog.messages) for name in ("notes.parquet", "README.txt", "copies/")] == [1, 1, 1]
    assert len(caplog.messages) == 3


def test_unreadable_segments_are_passed_over_with_a_warning_each(store: ReferenceStore, caplog) -> None:
    keys = [store.key([1], [n]) for n in range(4)]
    whole, torn, emptied, other = (store.append([k], [logps(-1, -2)]) for k in keys)
    path = root_of(store) / torn
    path.write_bytes(path.read_bytes()[:-5])
    (root_of(store) / emptied).write_bytes(b"")
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": [keys[3]], "logps": [[-1.0]]}), sink)
    (root_of(store) / other).write_bytes(sink.getvalue())
    index = store.index()
    assert index.find(keys).tolist() == [True, False, False, False]
    assert (index.segments, set(index.damaged)) == ((whole,), {torn, emptied, other})
    assert store.fetch(index, keys[:1]).to_pylist() == [[-1, -2]]
    assert [sum(name in m for m in caplog.messages) for name in (torn, emptied, other, whole)] == [1, 1, 1, 0]


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
        store.fetch(index, keys)
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


@pytest.mark.parametrize("bit", range(8))
def test_no_changed_bit_changes_a_log_prob(bit: int, store: ReferenceStore) -> None:
    """Wherever it is, it is seen, or it is in a byte that says nothing."""
    rng = np.random.default_rng(bit)
    keys = np.frombuffer(rng.bytes(16 * 20), KEY)
    values = [-rng.random(rng.integers(1, 9), dtype=np.float32) for _ in keys]
    path = root_of(store) / store.append(keys, values)
    sound, refused = path.read_bytes(), 0
    for at in rng.permutation(len(sound))[:300]:
        data = bytearray(sound)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        try:
            read_keys_, read_values_ = read_whole(store.partition, path.name)
        except ArtifactError:
            refused += 1
        else:
            assert np.array_equal(read_keys_, keys)
            assert read_values_.to_pylist() == [v.tolist() for v in values]
    assert refused > 200


def test_a_large_segment_is_read_only_where_it_must_be(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "ROWS_PER_ROW_GROUP", 10)
    rng = np.random.default_rng(0)
    keys = np.frombuffer(rng.bytes(16 * 95), KEY)
    values = [-rng.random(rng.integers(0, 9), dtype=np.float32) for _ in keys]
    path = root_of(store) / store.append(keys, values)
    footer = pq.read_metadata(path)
    assert footer.num_row_groups == 10
    # Damage the values of the fourth row group: the others can still be read.
    damaged = footer.row_group(3).column(1)
    data = bytearray(path.read_bytes())
    data[damaged.data_page_offset + damaged.total_compressed_size - 3] ^= 1
    path.write_bytes(data)
    index = store.index()
    wanted = [94, 0, 29, 40, 41, 0, 93, 7]
    assert store.fetch(index, keys[wanted]).to_pylist() == [values[n].tolist() for n in wanted]
    with pytest.raises(ArtifactError, match="damaged"):
        store.fetch(index, keys[[0, 35]])


class FailingStream(io.BytesIO):
    """A file on a disk or in a bucket that fails while it is read."""

    def __init__(self, data: bytes, error: Exception) -> None:
        super().__init__(data)
        self._error = error

    def read(self, count: int | None = -1) -> bytes:
        raise self._error


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), TimeoutError(), ConnectionResetError(), RuntimeError("client")]
)
def test_a_place_that_fails_is_not_taken_for_damage(error: Exception, store: ReferenceStore, monkeypatch) -> None:
    store.append([bytes(16)], [logps(-1)])
    index = store.index()
    monkeypatch.setattr(Storage, "open_input", lambda self, name: FailingStream(self.read_bytes(name), error))
    for read in (store.index, lambda: store.fetch(index, [bytes(16)])):
        with pytest.raises(InfrastructureError, match="cannot be read"):
            read()


def test_what_was_merged_since_is_found_again(store: ReferenceStore) -> None:
    keys = [store.key([1], [n]) for n in range(3)]
    names = [store.append([key], [logps(-1 - n)]) for n, key in enumerate(keys)]
    index = store.index()
    store.append(keys[:2], [logps(-1), logps(-2)])
    for name in names[:2]:
        store.partition.delete(name)
    assert store.fetch(index, keys).to_pylist() == [[-1], [-2], [-3]]
    store.partition.delete(names[2])
    with pytest.raises(ArtifactError, match="no log-probs for the key") as refused:
        store.fetch(index, keys)
    assert "run again" in refused.value.fix


def test_use_is_noted_at_most_once_an_hour(store: ReferenceStore) -> None:
    marker = root_of(store) / "used.json"
    store.index()
    assert not marker.exists()  # an empty store is not made by looking at it
    before = time.time()
    store.append([bytes(16)], [logps(-1)])
    noted = json.loads(marker.read_text())["unix_seconds"]
    assert before <= noted <= time.time()
    store.append([bytes(16)], [logps(-1)])
    store.index()
    assert json.loads(marker.read_text())["unix_seconds"] == noted
    for stale in (json.dumps({"unix_seconds": noted - 3601}), "{}", "[", "[1]", '{"unix_seconds": null}'):
        marker.write_text(stale)
        store.index()
        assert json.loads(marker.read_text())["unix_seconds"] > noted


def test_a_store_that_may_only_be_read_can_be_read(store: ReferenceStore, caplog) -> None:
    store.append([bytes(16)], [logps(-1)])
    (root_of(store) / "used.json").unlink()
    (root_of(store) / "used.json").mkdir()  # as root, no permission would stop a test from writing
    assert store.fetch(store.index(), [bytes(16)]).to_pylist() == [[-1]]
    assert "could not be recorded" in caplog.text


ids_of_a_group = st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=5), st.lists(ids, max_size=4))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.lists(ids_of_a_group, max_size=8), st.integers(0, 3), st.lists(st.integers(1, 4), max_size=4), st.integers(1, 3)
)
def test_keys_of_a_table_are_those_of_its_rows(groups, skipped: int, cuts: list[int], at_once: int) -> None:
    """However the table is sliced and chunked."""
    store = ReferenceStore(Storage("/nowhere"), MODEL, NUMERICS)
    schema = pa.schema([("prompt_ids", pa.list_(pa.int32())), ("completion_ids", pa.list_(pa.list_(pa.int32())))])
    table = pa.Table.from_pylist([{"prompt_ids": p, "completion_ids": c} for p, c in groups], schema=schema)
    pieces, begin = [], skipped
    for rows in cuts:
        pieces.append(table.slice(begin, rows))
        begin += rows
    table = pa.concat_tables([*pieces, table.slice(begin)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "GROUPS_AT_ONCE", at_once)
        keys = store.keys(table)
    assert keys.dtype == KEY
    assert keys.tolist() == [store.key(prompt, c) for prompt, completions in groups[skipped:] for c in completions]


def test_token_ids_with_nulls_have_no_key(store: ReferenceStore) -> None:
    schema = pa.schema([("prompt_ids", pa.list_(pa.int32())), ("completion_ids", pa.list_(pa.list_(pa.int32())))])
    for prompt, completions in (([1], None), (None, [[1]]), ([1], [None]), ([1, None], [[1]]), ([1], [[None]])):
        table = pa.Table.from_pylist([{"prompt_ids": prompt, "completion_ids": completions}], schema=schema)
        with pytest.raises(ValueError, match="null"):
            store.keys(table)


def test_numerics_and_store_survive_pickling(store: ReferenceStore) -> None:
    again = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert again == store
    assert again.key([1], [2]) == store.key([1], [2])


# What each step does: commit keys with values, tear a file, or put in a file that is no segment.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 12), max_size=6)),
        st.tuples(st.just("tear"), st.integers(0, 9)),
        st.tuples(st.just("foreign"), st.integers(0, 9)),
    ),
    max_size=10,
)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(steps, st.lists(st.integers(0, 12), max_size=8))
def test_a_store_is_a_dictionary_of_what_is_whole(steps, wanted: list[int]) -> None:
    with tempfile.TemporaryDirectory() as root:
        store = ReferenceStore(Storage(root), MODEL, NUMERICS)
        held: list[tuple[str, dict[int, list[float]]]] = []  # of each segment, oldest first
        for number, (action, what) in enumerate(steps):
            if action == "append":
                values = [[-float(n), -float(number)] for n in what]
                name = store.append([store.key([n], [7]) for n in what], [logps(*v) for v in values])
                held.append((name, dict(zip(what, values, strict=True))))
            elif action == "tear" and what < len(held):
                path = root_of(store) / held.pop(what)[0]
                path.write_bytes(path.read_bytes()[:-1])
            elif action == "foreign":
                store.partition.write(f"segment-{what}.parquet", b"PAR1")
        expected: dict[int, list[float]] = {}
        for _, values in held:
            expected = values | expected
        index = store.index()
        assert index.find([store.key([n], [7]) for n in range(13)]).tolist() == [n in expected for n in range(13)]
        known = [n for n in wanted if n in expected]
        assert store.fetch(index, [store.key([n], [7]) for n in known]).to_pylist() == [expected[n] for n in known]
        if known != wanted:
            with pytest.raises(ArtifactError, match="no log-probs for the key"):
                store.fetch(index, [store.key([n], [7]) for n in wanted])
