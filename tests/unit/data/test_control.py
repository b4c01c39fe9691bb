"""Control characters are refused, removed or kept, as the recipe's rule says, wherever a row has text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.control import controlled
from dpo_ray.data.formats.read import text_group

RED = "\x1b[1;31mred\x1b[0m"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (RED, "red"),
        ("\x1b]8;;https://host/\x1b\\a link\x1b]8;;\x07", "a link"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b(Bplain\x1b=\x1bM", "plain"),
        ("page\x0cpage\x0bline", "page\npage\nline"),
        ("a\x00b\x08\x7f", "ab"),
        ("\x1b", ""),
        ("tab\tand\r\nline ends, \x85 and é", "tab\tand\r\nline ends, \x85 and é"),
    ],
)
def test_cleaning_removes_escape_sequences_as_a_whole(text: str, clean: str) -> None:
    assert controlled(text, "clean", "a text") == clean


@given(st.text(alphabet="ab\t\n\x00\x07\x0b\x0c\x1b\x7f[];m\\0é"))
def test_cleaned_text_holds_no_control_character(text: str) -> None:
    clean = controlled(text, "clean", "a text")
    assert not any((ord(c) < 32 and c not in "\t\n\r") or c == "\x7f" for c in clean)
    assert controlled(text, "keep", "a text") == text


ROWS = [
    {"prompt": RED, "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "b", "rejected": RED},
    {"chosen": f"\n\nHuman: {RED}\n\nAssistant: b", "rejected": f"\n\nHuman: {RED}\n\nAssistant: c"},
    {"prompt": [{"role": "user", "content": "a", "name": RED}], "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"type": "function", "function": {"name": RED}}]},
    {"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": {"x": [RED]}},
    {"prompt": "a", "completion": RED, "label": True},
]


@pytest.mark.parametrize("row", ROWS)
def test_the_rule_applies_to_all_text_of_a_row(row: dict) -> None:
    def read(controls):
        return text_group(row, "auto", Columns(), {}, controls)

    with pytest.raises(Rejected) as caught:
        read("quarantine")
    assert caught.value.reason == "CONTROL_CHARS"
    assert "U+001B" in caught.value.detail
    assert RED in repr(read("keep")).encode().decode("unicode_escape")
    assert "\\x1b" not in repr(read("clean"))
    assert "red" in repr(read("clean"))


def test_what_is_nothing_or_the_same_once_it_is_clean_is_a_fault() -> None:
    for row, reason in (
        ({"prompt": "a", "chosen": "b", "rejected": "\x1b[0m"}, "EMPTY_REJECTED"),
        ({"prompt": "a", "chosen": "b", "rejected": "b\x00"}, "IDENTICAL_PAIR"),
    ):
        with pytest.raises(Rejected) as caught:
            text_group(row, "auto", Columns(), {}, "clean")
        assert caught.value.reason == reason
