"""Every format that preference data comes in, recognised row by row, gives the same groups."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config.data import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup, text_group


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HI = (user("Hi"),)
SAME_CONTENT = {
    "text": {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
    "messages": {"prompt": [user("Hi")], "chosen": [answer("yes")], "rejected": [answer("no")]},
    "messages, completions as text": {"prompt": [user("Hi")], "chosen": "yes", "rejected": "no"},
    "messages, prompt repeated": {
        "prompt": [user("Hi")],
        "chosen": [user("Hi"), answer("yes")],
        "rejected": [user("Hi"), answer("no")],
    },
    "messages with more fields": {
        "prompt": [user("Hi")],
        "chosen": [{**user("Hi"), "name": None}, answer("yes")],
        "rejected": [{**user("Hi"), "name": None}, answer("no")],
    },
    "implicit_messages": {"chosen": [user("Hi"), answer("yes")], "rejected": [user("Hi"), answer("no")]},
    "ultrafeedback": {
        "prompt": "Hi",
        "chosen": [user("Hi"), answer("yes")],
        "rejected": [user("Hi"), answer("no")],
        "score_chosen": 8.0,
    },
    "prompt as text, completions as messages": {"prompt": "Hi", "chosen": [answer("yes")], "rejected": [answer("no")]},
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    "hh, stripped": {"chosen": "Human: Hi\n\nAssistant: yes", "rejected": "Human: Hi\n\nAssistant: no"},
    "implicit_text": {"chosen": "Hi yes", "rejected": "Hi no"},
}


@pytest.mark.parametrize("template", ["auto", "chatml as text"])
def test_same_content_gives_the_same_group_in_every_format(prepare, jsonl, chatml_dir, template):
    from .conftest import CHATML

    prepared = prepare(
        jsonl(SAME_CONTENT.values()), tokenizer_dir=chatml_dir, template=CHATML if template != "auto" else "auto"
    )
    assert prepared.reasons() == []
    assert prepared.rows["train/duplicates"] == len(SAME_CONTENT) - 1
    (group,) = prepared.groups()
    assert len(group["completion_ids"]) == 2
    assert group["scores"] == [1.0, 0.0]
    assert group["preference_probability"] == group["weight"] == 1.0


@pytest.mark.parametrize(("name", "row"), SAME_CONTENT.items(), ids=list(SAME_CONTENT))
def test_named_format_agrees_with_auto(name: str, row: dict[str, Any]):
    named = {"ultrafeedback": "implicit_messages", "prompt as text, completions as messages": "implicit_messages"}
    row_format = named.get(name, name.split()[0].rstrip(","))
    assert text_group(row, row_format, Columns()) == text_group(row, "auto", Columns())


def test_groups_before_rendering():
    for name in ("messages", "implicit_messages", "ultrafeedback", "messages with more fields"):
        assert text_group(SAME_CONTENT[name], "auto", Columns()) == TextGroup(HI, ("yes", "no"), (1.0, 0.0))
    assert text_group(SAME_CONTENT["text"], "auto", Columns()) == TextGroup("Hi", ("yes", "no"), (1.0, 0.0))


def test_hh_with_several_turns_keeps_the_text_and_the_turns():
    begin = "\n\nHuman: What is\n\nthat?\n\nAssistant: A cat.\x00\n\nHuman: And that?\n\nAssistant:"
    group = text_group({"chosen": f"{begin} A dog.", "rejected": f"{begin} Go away."}, "auto", Columns())
    assert group.prompt == begin
    assert group.completions == (" A dog.", " Go away.")
    assert group.messages == (user("What is\n\nthat?"), answer("A cat.\x00"), user("And that?"))


def test_hh_text_before_the_first_turn_is_the_systems():
    begin = "Be kind.\n\nHuman: Hi\n\nAssistant:"
    group = text_group({"chosen": f"{begin} a", "rejected": f"{begin} b"}, "hh", Columns())
    assert group.messages == ({"role": "system", "content": "Be kind."}, user("Hi"))


def test_implicit_text_splits_no_word():
    group = text_group({"chosen": "It was brilliant.", "rejected": "It was broken."}, "auto", Columns())
    assert (group.prompt, group.completions) == ("It was", (" brilliant.", " broken."))
    group = text_group({"chosen": "a b", "rejected": "a b c"}, "implicit_text", Columns())
    assert (group.prompt, group.completions) == ("a", (" b", " b c"))


@pytest.mark.parametrize("row_format", ["hh", "implicit_text", "implicit_messages"])
def test_null_prompt_is_none_where_the_format_takes_none(row_format: str):
    row = SAME_CONTENT[row_format]
    assert text_group({**row, "prompt": None}, row_format, Columns()) == text_group(row, row_format, Columns())
    with pytest.raises(Rejected) as caught:
        text_group({**SAME_CONTENT["text"], "prompt": None}, "auto", Columns())
    assert caught.value.reason == "NULL_FIELD"


def test_renamed_columns(prepare, jsonl):
    path = jsonl([{"question": "Say it.", "better": " good", "worse": " bad", "chosen": "another thing"}])
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    renamed = prepare({"path": path, "columns": columns}).groups()
    plain = prepare(jsonl([{"prompt": "Say it.", "chosen": " good", "rejected": " bad"}], "plain.jsonl")).groups()
    assert [g["group_id"] for g in renamed] == [g["group_id"] for g in plain]
