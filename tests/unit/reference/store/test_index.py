"""The index of the reference store against a dictionary, and how it travels."""

from __future__ import annotations

import pickle  # noqa: TID251 (what Ray does with arguments)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.reference.store.index import KEY, StoreIndex, as_keys, first_of_equal

# Few bytes at few places, so that halves are often equal, and zeros stand at the end, where NumPy's byte strings lose them.
half = st.sampled_from([bytes(8), bytes(7) + b"\1", b"\1" + bytes(7), b"\xff" * 8, b"\x80" + bytes(7)])
key = st.builds(lambda a, b: a + b, half, half)
segments = st.lists(st.lists(key, max_size=8), max_size=5)


def index_of(columns: list[list[bytes]], first_number: int = 0) -> StoreIndex:
    names = [f"segment-{first_number + n}" for n in range(len(columns))]
    return StoreIndex.of(names, [as_keys(column) for column in columns])


def places_of(columns: list[list[bytes]]) -> dict[bytes, tuple[str, int]]:
    found: dict[bytes, tuple[str, int]] = {}
    for n, column in enumerate(columns):
        for row, k in enumerate(column):
            found.setdefault(k, (f"segment-{n}", row))
    return found


def places_in(index: StoreIndex, keys: list[bytes]) -> list[tuple[str, int] | None]:
    return [
        (index.segments[index.segment[at]], int(index.row[at])) if at >= 0 else None for at in index.positions(keys)
    ]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(segments, st.lists(key, max_size=20))
def test_an_index_is_a_dictionary_of_first_places(columns: list[list[bytes]], asked: list[bytes]) -> None:
    index, expected = index_of(columns), places_of(columns)
    assert len(index) == len(expected)
    assert places_in(index, asked) == [expected.get(k) for k in asked]
    assert index.find(asked).tolist() == [k in expected for k in asked]
    assert sorted(index.keys_at(np.arange(len(index))).tolist()) == sorted(expected)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(segments, segments)
def test_joined_indexes_are_one_of_all_segments(some: list[list[bytes]], others: list[list[bytes]]) -> None:
    joined = index_of(some).joined(index_of(others, len(some)))
    expected = places_of(some + others)
    assert len(joined) == len(expected)
    assert places_in(joined, list(expected)) == list(expected.values())


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(key, max_size=20))
def test_the_first_of_equal_keys(keys: list[bytes]) -> None:
    assert first_of_equal(as_keys(keys)).tolist() == [k not in keys[:n] for n, k in enumerate(keys)]


def test_keys_of_chance_are_found_and_others_not() -> None:
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * 50_000), KEY)
    index = StoreIndex.of(["a", "b"], [keys[:20_000], keys[20_000:40_000]])
    assert index.find(keys).tolist() == [True] * 40_000 + [False] * 10_000
    at = index.positions(keys[:40_000])
    assert np.array_equal(index.segment[at] * 20_000 + index.row[at], np.arange(40_000))
    assert np.array_equal(index.keys_at(at), keys[:40_000])


def test_it_takes_24_bytes_a_key() -> None:
    index = StoreIndex.of(["a"], [np.frombuffer(np.random.default_rng(0).bytes(16 * 1000), KEY)])
    assert sum(a.nbytes for a in (index.first, index.second, index.segment, index.row)) == 24 * 1000


def test_it_travels_without_a_copy_and_works_where_it_cannot_be_written() -> None:
    """Ray puts what pickles out of band into shared memory, and gives it out read-only."""
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * 1000), KEY)
    index = StoreIndex.of(["a"], [keys[:500]])
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 2000
    assert sum(b.raw().nbytes for b in buffers) == 24 * 500
    again = pickle.loads(data, buffers=[bytes(b.raw()) for b in buffers])  # noqa: S301
    assert not any(a.flags.writeable for a in (again.first, again.second, again.segment, again.row))
    assert again.find(keys).tolist() == [True] * 500 + [False] * 500
    joined = again.joined(StoreIndex.of(["b"], [keys[500:]]))
    assert joined.find(keys).all()
    assert joined.segments == ("a", "b")


@pytest.mark.parametrize("wrong", [[b"short"], [bytes(16), bytes(17)], np.zeros(2, "S16"), np.zeros((2, 1), KEY)])
def test_what_is_no_key_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="key"):
        index_of([]).find(wrong)
