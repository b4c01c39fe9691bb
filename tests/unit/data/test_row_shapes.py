"""A row of any shape is admitted with all that it says, or quarantined for a reason that the docs list."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings

from dpo_ray.config.data import DataConfig
from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.catalog import message_columns
from dpo_ray.data.formats.message_text import decoded
from dpo_ray.data.formats.read import TEXT_FORMATS, text_group
from dpo_ray.data.formats.recognise import recognise
from dpo_ray.data.groups import TokenGroup
from dpo_ray.data.pairing import paired
from dpo_ray.data.tokenizing.chat import load_tokenizer
from tests.helpers.drawn_messages import Pen
from tests.helpers.row_shapes import LAYOUTS, Case, cases
from tests.unit.data.conftest import CHATML, tokenized_groups

PAGE = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
WRITES_ALL = "{{ tools | tojson if tools }}" + CHATML.replace(
    "{{ m['content'] }}",
    "{{ m.name }} {{ m.reasoning_content }} {{ m.thinking }} {{ m.content }} {{ m.tool_calls | tojson if m.tool_calls }}",
)
CONFIG = DataConfig.model_validate(
    {"train": "unread.jsonl", "max_length_tokens": 10**6, "pairing": {"pairs": "list", "ties": "keep"}}
)

PAIR = {"chosen": ("chosen",), "rejected": ("rejected",)}
EVERY = {"system": ("system",), "tools": ("tools",)}
RESPONSES = {f"response {i}": (f"response{i}", f"response_{i}") for i in range(4)}
CONTENT: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"prompt": ("prompt",), **PAIR},
    "messages": {"prompt": ("prompt",), **PAIR},
    "implicit_messages": {"prompt": ("prompt",), **PAIR},
    "implicit_text": PAIR,
    "hh": PAIR,
    "unpaired": {"prompt": ("prompt", "instruction", "question", "input", "messages"), "completion": ("completion",)},
    "scored": {
        "prompt": ("prompt", "instruction", "question", "messages", "context"),
        "completions": ("completions", "answers", "responses", "generations"),
    },
    "nemo": {"prompt": ("context",), "completions": ("completions",)},
    "verdicts": {"prompt": ("instruction", "prompt", "question"), "input": ("input",), **RESPONSES},
    "alpaca": {
        "prompt": ("instruction", "prompt"),
        "input": ("input", "query"),
        "history": ("history",),
        **PAIR,
    },
    "sharegpt": {"prompt": ("conversations", "messages"), **PAIR},
    "swift": {
        "prompt": ("messages",),
        "query": ("query",),
        "history": ("history",),
        "chosen": ("response",),
        "rejected": ("rejected_response", "rejected_messages"),
    },
    "compared": {
        "prompt": ("prompt", "context", "instruction", "question"),
        "conversation a": ("conversation_a",),
        "conversation b": ("conversation_b",),
        **RESPONSES,
    },
    "axolotl": {
        "prompt": ("messages", "prompt", "question", "instruction", "input"),
        "chosen": ("chosen", "chosen_response"),
        "rejected": ("rejected", "rejected_response"),
    },
}
"""What docs/data.md lists as the columns of a format; of several names, the first that is not null. Beside a prompt of text,
a recognised format reads `history`, `input` and `query` too, or refuses the row."""

NO_CONTENT = {
    "id", "tool_call_id", "weight", "type", "model", "overall_score", "score", "rating", "rank", "label", "kto_tag", "role", "from",
}  # fmt: skip
"""Fields within a column that are no content."""


@pytest.fixture(scope="module")
def tokenizer(chatml_dir: str):
    return load_tokenizer(chatml_dir)


def trained_on(case: Case, tokenizer, template: str) -> TokenGroup | Rejected:
    try:
        group = text_group(case.source_row, case.row_format, Columns(**case.roles), {})  # type: ignore[arg-type]
        group = paired(group, CONFIG.pairing)
    except Rejected as rejected:
        return rejected
    (result,) = tokenized_groups([group], tokenizer, template, CONFIG)
    return result


def texts_of(group: TokenGroup, tokenizer) -> list[str]:
    """Return the text of each completion, behind the prompt."""
    return [tokenizer.decode([*group.prompt_ids, *ids]) for ids in group.completion_ids]


def words(value: Any) -> set[str]:
    """Return the words of content within a value."""
    if isinstance(value, str | bytes):
        return set(re.findall(r"w\d+w", value if isinstance(value, str) else value.decode()))
    if isinstance(value, dict):
        return {w for k, v in value.items() if k not in NO_CONTENT for w in words(k) | words(v)}
    return {w for v in value for w in words(v)} if isinstance(value, list | tuple) else set()


def content(case: Case) -> dict[str, set[str]]:
    """Return the words of what the row says, by the role of the column."""
    row, columns = case.source_row, Columns(**case.roles)  # type: ignore[arg-type]
    row_format = case.row_format
    if row_format not in TEXT_FORMATS:
        row = decoded(row, message_columns(columns))  # type: ignore[arg-type]
    if row_format == "auto":
        row_format = recognise(row, columns)
    said = {}
    for role, names in {**CONTENT[row_format], **EVERY}.items():
        mine = (case.roles[role],) if role in case.roles else names
        said[role] = words(next((row[n] for n in mine if row.get(n) is not None), None))
    prompt = next((row[n] for n in CONTENT[row_format].get("prompt", ()) if row.get(n) is not None), None)
    is_left_open = case.row_format == "auto" and "prompt" not in case.roles
    if is_left_open and isinstance(prompt, str) and row_format != "implicit_messages":
        for name, kind in (("history", list), ("input", str), ("query", str)):
            said[name] = words(row[name]) if isinstance(row.get(name), kind) else set()
    return said


def check(case: Case, tokenizer, template: str = WRITES_ALL) -> str:
    """Check one row; return what became of it, which `--hypothesis-show-statistics` counts."""
    result = trained_on(case, tokenizer, template)
    if isinstance(result, Rejected):
        assert f"| `{result.reason}` |" in PAGE
        return result.reason
    said, texts = content(case), [words(text) for text in texts_of(result, tokenizer)]
    assert set().union(*said.values()) <= set().union(*texts)
    if "chosen" in said and "rejected" in said and len(texts) == 2:
        both = said["chosen"] & said["rejected"] | said.get("prompt", set())  # a conversation there may end with chosen
        assert not texts[0] & (said["rejected"] - both)
        assert not texts[1] & (said["chosen"] - both)
    for text in texts:
        assert sum(bool(text & own) for own in completions(case)) <= 1
    return "admitted"


def completions(case: Case) -> list[set[str]]:
    """Return the words that only one of a row's completions has, for each, where they are a list or a column each."""
    lists = [case.row[name] for name in CONTENT["scored"]["completions"] if isinstance(case.row.get(name), list)]
    each = [words(item) for item in lists[0]] if lists else []
    return [own - set().union(*(other for other in each if other is not own)) for own in each]


@settings(max_examples=300)
@given(case=cases())
def test_a_row_of_any_shape_is_admitted_with_all_that_it_says_or_has_a_reason(case: Case, tokenizer) -> None:
    event(check(case, tokenizer))


@settings(max_examples=100)
@given(case=cases())
def test_a_template_of_role_and_content_alone_is_given_nothing_else(case: Case, tokenizer) -> None:
    event(check(case, tokenizer, CHATML))


@pytest.mark.long
@pytest.mark.timeout(1800)  # two minutes on a core of its own
@settings(max_examples=10_000)
@given(case=cases())
def test_so_are_many_more(case: Case, tokenizer) -> None:
    event(check(case, tokenizer))
    event(f"{check(case, tokenizer, CHATML)}, by a template of role and content")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_simplest_row_of_each_layout_is_admitted(name: str, tokenizer) -> None:
    """Otherwise the tests above would pass by refusing all."""
    case = Case(LAYOUTS[name](Pen(lambda options: 0)))
    assert isinstance(trained_on(case, tokenizer, CHATML), TokenGroup)
    check(case, tokenizer)


def test_every_column_of_content_stands_in_the_docs() -> None:
    listed = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    for row_format, columns in CONTENT.items():
        roles = {role for role in columns if " " not in role}
        assert all(f"`{role}`" in listed[row_format] for role in roles if "as `text`" not in listed[row_format]), (
            row_format
        )
