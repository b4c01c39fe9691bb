"""JSON lists are cut into the elements that a JSON parser sees, wherever the chunks end, and damage stays where it is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.data.admission import Rejected
from dpo_ray.data.readers import json_rows as module
from dpo_ray.data.readers.json_rows import json_rows

TEXT = st.text(st.sampled_from('ab"\\[]{},: \n\té€'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def in_chunks(text: bytes, size: int) -> Iterator[bytes]:
    return (text[i : i + size] for i in range(0, len(text), size))


def read(text: bytes, size: int = 7) -> list[Any]:
    return [row.reason if isinstance(row, Rejected) else row for row, _ in json_rows(in_chunks(text, size))]


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk_bytes=st.integers(1, 30),
)
def test_a_list_gives_the_elements_that_json_gives(
    values: list[Any], indent: int | None, ascii_only: bool, chunk_bytes: int
):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    assert read(text, chunk_bytes) == values
    assert read(b"\xef\xbb\xbf\n " + text + b" \n", chunk_bytes) == values


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'"\xff"', "INVALID_UTF8"),
        (b"nul", "JSON_SYNTAX"),
        (b'{"a" 1}', "JSON_SYNTAX"),
        (b'{"a": 1}{"b": 2}', "JSON_SYNTAX"),
        (b"9" * 5000, "JSON_SYNTAX"),
        (b'{"a": "' + b"x" * 70_000 + b'"}', "TOO_LONG_BYTES"),
        (b'"' + b"\\\\" * 40_000 + b'"', "TOO_LONG_BYTES"),
        (b"[" + b'{"a": ["]"]},' * 9000 + b"0]", "TOO_LONG_BYTES"),
        (b"[" * 30_000 + b"]" * 30_000, "JSON_SYNTAX"),
    ],
)
def test_a_bad_element_costs_itself_alone(bad: bytes, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_ROW_BYTES", 60_500)
    for size in (999, 60_501, 1 << 20):
        assert read(b'[{"a": 1}, ' + bad + b', {"a": "]"}]', size) == [{"a": 1}, reason, {"a": "]"}]


def test_what_lines_and_lists_have_in_common_is_read_alike():
    odd = [b'{"a": NaN}', b'{"a": 1e400}', b'{"a": "\\ud800"}', b'{"a": 1, "a": 2}', b"123456789012345678901234567890"]
    as_lines = read(b"\n".join([b"0", *odd]))[1:]
    assert repr(read(b"[" + b",\n".join(odd) + b"]")) == repr(as_lines)
    assert len(as_lines) == len(odd)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (b"", []),
        (b" \n\n", []),
        (b"[]", []),
        (b"[\n]\n", []),
        (b"[1, 2,]", [1, 2]),
        (b'[1]\n{"a": 2}\n\nx\n', [1, {"a": 2}, "JSON_SYNTAX"]),
        (b'{"a": 1}\n[2]\n', [{"a": 1}, [2]]),
    ],
)
def test_small_texts(text: bytes, rows: list[Any]):
    assert read(text) == read(text, 1) == rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'[{"a": 1}, {"a"', "SHARD_TRUNCATED"),
        (b"[", "SHARD_TRUNCATED"),
        (b'[1, "', "SHARD_TRUNCATED"),
        (b'[{"a": [1}, 2]', "SHARD_DAMAGED"),
        (b"[1}, 2]", "SHARD_DAMAGED"),
    ],
)
def test_a_list_that_breaks_off_says_so(text: bytes, reason: str):
    for size in (1, 3, 100):
        with pytest.raises(Rejected) as caught:
            read(text, size)
        assert caught.value.reason == reason


def test_damage_never_loses_the_count_of_chunks():
    """Whatever bytes are changed, how the file comes in chunks makes no difference."""
    rng, text = random.Random(0), json.dumps([{"a": '"\\x', "b": [{}, "]"]}] * 9).encode()
    for _ in range(300):
        damaged = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(1, len(damaged))] = rng.choice(b'"\\[]{},x')
        outcomes = {repr(outcome(bytes(damaged), size)) for size in (1, 5, 1000)}
        assert len(outcomes) == 1


def outcome(text: bytes, size: int) -> list[Any]:
    rows: list[Any] = []
    try:
        for row, _ in json_rows(in_chunks(text, size)):
            rows.append(row.reason if isinstance(row, Rejected) else row)
    except Rejected as rejected:
        rows.append(rejected.reason)
    return rows
