"""CSV: a damaged row costs itself, whatever it does to the quotes."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.readers import csv_rows as module
from dpo_ray.data.readers.csv_rows import csv_rows

HEADER = b"prompt,chosen,rejected\r\n"
FIELDS = st.lists(st.sampled_from(["a", '"', ",", "\n", "\r\n", "\t", " ", "é€", ";", "'"]), max_size=6).map("".join)


def read(text: bytes, chunk_bytes: int = 5, delimiter: str = ",") -> list[Any]:
    chunks = (text[i : i + chunk_bytes] for i in range(0, len(text), chunk_bytes))
    rows = [row for row, _ in csv_rows(chunks, delimiter, Columns())]
    return [row.reason if isinstance(row, Rejected) else tuple(row.values()) for row in rows]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS, FIELDS), max_size=5),
    delimiter=st.sampled_from(",\t"),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    chunk_bytes=st.integers(1, 40),
)
def test_what_a_csv_writer_writes_is_read_back(
    rows: list[tuple[str, str, str]], delimiter: str, end: str, quoting: Any, chunk_bytes: int
):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([("prompt", "chosen", "rejected"), *rows])
    assert read(text.getvalue().encode(), chunk_bytes, delimiter) == rows


@pytest.mark.parametrize(
    ("bad", "reasons"),
    [
        (b"a,b\r\n", ["CSV_FIELDS"]),
        (b"a,b,c,d\r\n", ["CSV_FIELDS"]),
        (b"a,\xff,c\r\n", ["INVALID_UTF8"]),
        (b'a,"b\xff\n\n",c\r\n', ["INVALID_UTF8"]),
        (b'a,"b"x,c\r\n', ["CSV_SYNTAX"]),
        (b'a,"b,c\r\n', ["CSV_SYNTAX"]),
        (b'"a,b,c\r\n"d,e,f\r\n', ["CSV_SYNTAX", "CSV_SYNTAX"]),
        (b"a\rb,c,d\r\n", ["CSV_SYNTAX"]),
        (b"a,b," + b"x" * 600 + b"\r\n", ["TOO_LONG_BYTES"]),
        (b'a,b,"' + b"x\r\n" * 300 + b'"\r\n', ["TOO_LONG_BYTES", *["CSV_FIELDS"] * 299, "CSV_SYNTAX"]),
    ],
)
def test_a_bad_row_costs_itself_alone(bad: bytes, reasons: list[str], monkeypatch: pytest.MonkeyPatch):
    from dpo_ray.data.readers import json_rows

    monkeypatch.setattr(module, "MAX_ROW_BYTES", 500)
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 500)
    sound = [("1", '2, "two"', "3"), ("4", "5\n\n5", "6")]
    lines = b'1,"2, ""two""",3\r\n', b'4,"5\n\n5",6\r\n'
    assert read(HEADER + lines[0] + bad + lines[1]) == [sound[0], *reasons, sound[1]]


def test_a_quote_that_is_never_closed_leaves_the_rows_below_it():
    rows = [(f"p{i}", "c", "r") for i in range(2000)]
    text = HEADER + b'"x,y,z\r\n' + b"".join(",".join(row).encode() + b"\r\n" for row in rows)
    assert read(text, 1 << 16) == ["CSV_SYNTAX", *rows]


def test_reading_again_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "RETRY_BYTES", 50)
    text = HEADER + b'"x,y,z\r\n' + b"a,b,c\r\n" * 20
    assert read(text) == ["CSV_SYNTAX"]


def test_empty_lines_and_fields():
    assert read(b"\r\n" + HEADER + b'\r\na,,c\r\n\r\n"",b,\r\n') == [("a", "", "c"), ("", "b", "")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "SHARD_EMPTY"),
        (b"\xef\xbb\xbf", "SHARD_EMPTY"),
        (b"\r\n\n", "SHARD_EMPTY"),
        (b'"prompt,chosen', "SHARD_UNREADABLE"),
        (b"\xff,chosen,rejected\n", "SHARD_UNREADABLE"),
        (b"chosen,rejected,chosen\na,b,c\n", "SHARD_DUPLICATE_COLUMN"),
    ],
)
def test_a_file_without_a_usable_header(text: bytes, reason: str):
    with pytest.raises(Rejected) as caught:
        read(text)
    assert caught.value.reason == reason


def test_columns_that_no_row_is_made_of_may_stand_twice():
    assert read(b"chosen,rejected,note,note\na,b,c,d\n") == [("a", "b", "d")]
