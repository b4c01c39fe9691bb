"""The same content has the same group id and the same token ids, in whichever layout it comes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_ray.config.data import DataConfig
from dpo_ray.config.sources import Columns
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.groups import TokenGroup
from dpo_ray.data.pairing import paired
from dpo_ray.data.tokenizing.chat import load_tokenizer
from tests.helpers.published_rows import CHOSEN, PAIRS, PROMPT, REJECTED, UNPAIRED, published_row
from tests.unit.data.conftest import CHATML, tokenized_groups

WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(chatml_dir: str):
    return load_tokenizer(chatml_dir)


def tokenized(rows: list[dict[str, Any]], tokenizer, template: str = CHATML) -> list[TokenGroup]:
    config = DataConfig.model_validate({"train": "unread.jsonl"})
    groups = [paired(text_group(row, "auto", Columns(), {}), config.pairing) for row in rows]
    results = tokenized_groups(groups, tokenizer, template, config)
    assert [r for r in results if not isinstance(r, TokenGroup)] == []
    return results  # type: ignore[return-value]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_pairs_and_lists(tokenizer):
    groups = tokenized([published_row(name) for name in PAIRS], tokenizer)
    assert len({g.group_id for g in groups}) == len({g.prompt_hash for g in groups}) == 1
    for group in groups:
        assert tokenizer.decode(group.prompt_ids) == f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
        assert [tokenizer.decode(ids) for ids in group.completion_ids] == [
            f"{CHOSEN}<|im_end|>",
            f"{REJECTED}<|im_end|>",
        ]
        assert (list(group.chosen), list(group.rejected), group.preference_probability) == ([0], [1], 1.0)


def test_unpaired_examples(tokenizer):
    groups = tokenized([published_row(name) for name in UNPAIRED], tokenizer)
    assert len({g.group_id for g in groups}) == 1
    assert {(tokenizer.decode(g.completion_ids[0]), g.scores[0]) for g in groups} == {(f"{CHOSEN}<|im_end|>", 1.0)}
    (bad,) = tokenized([{**published_row(UNPAIRED[0]), "label": False}], tokenizer)
    assert bad.group_id == groups[0].opposite_id


def test_the_opposite_preference_has_the_opposite_id(tokenizer):
    row = {"prompt": PROMPT, "chosen": REJECTED, "rejected": CHOSEN}
    verdicts = {**published_row("pandalm"), "annotator1": 1, "annotator2": 1, "annotator3": 0}
    (group, opposite, judged) = tokenized([published_row("trl_standard"), row, verdicts], tokenizer)
    assert group.opposite_id == opposite.group_id == judged.group_id
    assert judged.preference_probability == pytest.approx(5 / 6)


def test_several_turns_and_a_system_text(tokenizer):
    turns = [turn("user", "Hi"), turn("assistant", "Hello."), turn("user", PROMPT)]
    whole = [turn("system", "Be brief."), *turns]
    said = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in turns]
    chosen, rejected = turn("assistant", CHOSEN), turn("assistant", REJECTED)
    text = f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {PROMPT}"
    ranked = [{"rank": 1, "completion": [rejected]}, {"rank": 0, "completion": [chosen]}]
    rows = [
        {"prompt": whole, "chosen": [chosen], "rejected": [rejected]},
        {"prompt": turns, "chosen": [chosen], "rejected": [rejected], "system": "Be brief."},
        {"chosen": [*whole, chosen], "rejected": [*whole, rejected]},
        {"prompt": PROMPT, "chosen": [*whole, chosen], "rejected": [*whole, rejected]},
        {"chosen": f"Be brief.{text}\n\nAssistant: {CHOSEN}", "rejected": f"Be brief.{text}\n\nAssistant: {REJECTED}"},
        {"messages": whole, "chosen": chosen, "rejected": rejected},
        {"context": whole, "completions": ranked},
        {"prompt": whole, "completions": [REJECTED, [chosen]], "scores": [-1, "1"]},
        {
            "conversations": said,
            "system": "Be brief.",
            "chosen": {"from": "gpt", "value": CHOSEN},
            "rejected": {"from": "gpt", "value": REJECTED},
        },
        {
            "instruction": PROMPT,
            "input": "",
            "history": [["Hi", "Hello."]],
            "system": "Be brief.",
            "chosen": CHOSEN,
            "rejected": REJECTED,
        },
    ]
    groups = tokenized(rows, tokenizer)
    assert len({g.group_id for g in groups}) == 1
    assert tokenizer.decode(groups[0].prompt_ids).count("<|im_start|>") == 5
    assert [tokenizer.decode(ids) for ids in groups[0].completion_ids] == [
        f"{CHOSEN}<|im_end|>",
        f"{REJECTED}<|im_end|>",
    ]


def test_calls_of_functions(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"name": "f", "description": "Do it.", "parameters": {"type": "object"}}
    trl = {
        "prompt": [
            turn("user", "Hi"),
            {"role": "assistant", "tool_calls": [call]},
            turn("tool", "2"),
        ],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "rejected": [turn("assistant", "2")],
        "tools": [{"type": "function", "function": tool}],
    }
    spoken = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    sharegpt = {
        "conversations": [{"from": "human", "value": "Hi"}, spoken, {"from": "observation", "value": "2"}],
        "chosen": spoken,
        "rejected": {"from": "gpt", "value": "2"},
        "tools": json.dumps([tool]),
    }
    one, other = tokenized([trl, sharegpt], tokenizer, WITH_TOOLS)
    assert one.group_id == other.group_id
    assert tokenizer.decode(one.prompt_ids).startswith('{"type": "function", "function": {"name": "f"')
    assert '"arguments": {"x": 1}' in tokenizer.decode(one.completion_ids[0])
