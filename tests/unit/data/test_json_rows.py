"""JSON lists are cut into the elements that a JSON parser sees, wherever the chunks end, and damage stays where it is."""

from __future__ import annotations

import itertools
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


PARTS = st.sampled_from(
    [b"\n", b"\r\n", b"\n\n", b"a", b" ", b"\xef\xbb\xbf", b"exactly 10", b"eleven chars", b"\0", b"x" * 25]
)


@settings(max_examples=300)
@given(parts=st.lists(PARTS, max_size=12), cuts=st.lists(st.integers(0, 200), max_size=8), keep_empty=st.booleans())
def test_lines_are_those_of_the_whole_text_wherever_chunks_end(parts: list[bytes], cuts: list[int], keep_empty: bool):
    text = b"".join(parts)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[start:stop] for start, stop in itertools.pairwise(bounds)]
    expected = text.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected  # what follows the last line end is no line
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "MAX_ROW_BYTES", 10)
        found = list(module.lines(chunks, keep_empty=keep_empty))
    assert [row.reason if isinstance(row, Rejected) else row for row, _ in found] == [
        "TOO_LONG_BYTES" if len(line) > 10 else line for line in expected if line or keep_empty
    ]
    assert all(size == len(row) for row, size in found if not isinstance(row, Rejected))


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


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_line_is_read_as_utf_8_alone(encoding: str):
    rows = read(b'{"a": 1}\n' + '{"a": 2}'.encode(encoding) + b'\n{"a": 3}')
    assert rows == [{"a": 1}, "JSON_SYNTAX", {"a": 3}]


def test_joined_files_have_a_byte_order_mark_each():
    assert read(b'\xef\xbb\xbf{"a": 1}\r\n\xef\xbb\xbf{"a": 2}\r\n') == [{"a": 1}, {"a": 2}]


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
