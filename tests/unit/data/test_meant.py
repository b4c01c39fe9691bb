"""Nothing is trained on that a row does not mean: what is no text, what is text of another kind, what a template drops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.config.data import DataConfig, PairingConfig
from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.pairing import paired
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import list_shards, pieces
from dpo_ray.data.tokenizing.chat import load_tokenizer
from tests.helpers.published_rows import answer, published_row, read, reason, said, system, user
from tests.unit.data.conftest import tokenized_groups

PAIR = {"prompt": [user("q")], "chosen": [answer("good")], "rejected": [answer("bad")]}
IMPLICIT = {"chosen": [user("q"), answer("good")], "rejected": [user("q"), answer("bad")]}


class TestContent:
    @pytest.mark.parametrize(
        "parts",
        [
            [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}],
            [{"type": "text", "text": "two parts", "image": None}],
            {"type": "text", "text": "two parts"},
            [{"text": "two parts"}],
            ["two ", "parts"],
            [{"type": "input_text", "text": "two parts"}],
        ],
    )
    def test_parts_of_text_are_joined(self, parts: Any) -> None:
        group = read(
            {"prompt": [{"role": "user", "content": parts}], "chosen": [answer("a")], "rejected": [answer("b")]}
        )
        assert group.prompt == ({"role": "user", "content": "two parts"},)

    @pytest.mark.parametrize("content", [[], None, 3, [3], [{"type": "text"}], [{"type": "text", "text": 3}]])
    def test_what_is_no_text_is_a_bad_message(self, content: Any) -> None:
        assert reason({**PAIR, "prompt": [{"role": "user", "content": content}]}) == "BAD_MESSAGE"

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image"},
            {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
            {"type": "audio", "audio": "a.wav"},
            {"type": "video"},
            {"type": "text", "text": "q", "image": "cat.png"},
        ],
    )
    def test_a_part_that_is_an_image_or_sound_is_named(self, part: dict[str, Any]) -> None:
        turns = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
        assert reason({**PAIR, "prompt": turns}) == "UNSUPPORTED_MEDIA"

    @pytest.mark.parametrize("column", ["images", "image", "videos", "video", "audios", "audio", "Image", "image_url"])
    @pytest.mark.parametrize("value", [["cat.png"], "cat.png", {"bytes": b"x", "path": None}, b"x"])
    def test_a_column_of_images_or_sound_is_named(self, column: str, value: Any) -> None:
        with pytest.raises(Rejected) as caught:
            read({**PAIR, column: value})
        assert caught.value.reason == "UNSUPPORTED_MEDIA"
        assert column in caught.value.detail

    @pytest.mark.parametrize("value", [None, [], "", {"bytes": None, "path": None}])
    def test_an_empty_one_says_nothing(self, value: Any) -> None:
        assert read({**PAIR, "images": value}) == read(PAIR)

    def test_a_column_that_the_recipe_takes_as_text_is_text(self) -> None:
        row = {"image": "draw a cat", "chosen": "a", "rejected": "b"}
        assert text_group(row, "text", Columns(prompt="image"), {}).prompt == "draw a cat"


def test_images_in_a_table_are_seen_though_no_format_reads_them(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({**{k: ["x", "y"] for k in ("prompt", "chosen", "rejected")}, "images": [["a.png"], None]}),
        tmp_path / "a.parquet",
    )
    source = DataConfig.model_validate({"train": str(tmp_path / "a.parquet")}).train
    (piece,) = pieces(list_shards("train", source)[0])
    rows = [row for batch in read_batches(piece, 10) for _, row in batch]
    assert [row["images"] for row in rows] == [["a.png"], None]


class TestMessagesAsText:
    @pytest.mark.parametrize("dumped", [json.dumps, repr, lambda value: "\n " + repr(value)])
    @pytest.mark.parametrize("row", [PAIR, IMPLICIT, {**PAIR, "chosen": answer("good"), "rejected": answer("bad")}])
    def test_they_are_messages(self, row: dict[str, Any], dumped) -> None:
        assert read({name: dumped(value) for name, value in row.items()}) == read(row)

    def test_so_are_sharegpts_and_those_of_a_list(self) -> None:
        spoken = [{"from": "human", "value": "q"}]
        row = {
            "conversations": spoken,
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        }
        assert read({name: json.dumps(value) for name, value in row.items()}) == read(row)
        each = {name: [json.dumps(turn) for turn in turns] for name, turns in IMPLICIT.items()}
        assert read(each) == read(IMPLICIT)

    def test_a_column_for_each_field_is_read_as_messages(self) -> None:
        """As `datasets` stores a Sequence of objects."""
        turned = {
            n: {"role": [m["role"] for m in v], "content": [m["content"] for m in v]} for n, v in IMPLICIT.items()
        }
        assert read(turned) == read(IMPLICIT)

    @pytest.mark.parametrize(
        "text",
        [
            "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",  # as numpy prints them
            "array([{'content': 'a', 'role': 'user'}], dtype=object)",
            '[{"role": "user", "content": "cut o',
            "[{'role': 'user', 'content': 'a'}, 3]",
        ],
    )
    def test_what_begins_like_messages_and_cannot_be_read_is_a_fault(self, text: str) -> None:
        for row in ({**PAIR, "prompt": text}, {"prompt": "q", "chosen": text, "rejected": "b"}):
            assert reason(row) == "BAD_MESSAGE"

    @pytest.mark.parametrize("text", ['{"name": "x"}', "[1, 2]", '[{"role": "admin"}]', "{'content': 3", "[role] hi"])
    def test_other_json_is_text(self, text: str) -> None:
        assert read({"prompt": text, "chosen": "a", "rejected": "b"}).prompt == text

    def test_a_recipe_that_says_text_means_text(self) -> None:
        row = {"prompt": json.dumps(PAIR["prompt"]), "chosen": "a", "rejected": "b"}
        assert text_group(row, "text", Columns(), {}).prompt == row["prompt"]


class TestPrompts:
    def test_a_null_prompt_beside_conversations_says_nothing(self) -> None:
        assert read({**IMPLICIT, "prompt": None, "question": None}) == read(IMPLICIT)
        assert read({**IMPLICIT, "prompt": None, "question": "q"}) == read(IMPLICIT)

    def test_a_null_prompt_beside_answers_is_null(self) -> None:
        assert reason({"prompt": None, "chosen": "good", "rejected": "bad"}) == "NULL_FIELD"
        assert reason({**PAIR, "prompt": None}) == "NULL_FIELD"

    @pytest.mark.parametrize("prompt", ["q", " q ", "", "Human: q"])
    def test_the_prompt_of_the_conversations_may_be_said_twice(self, prompt: str) -> None:
        assert read({**IMPLICIT, "prompt": prompt}) == read(IMPLICIT)

    def test_another_prompt_than_that_of_the_conversations_is_a_fault(self) -> None:
        assert reason({**IMPLICIT, "prompt": "something else"}) == "PROMPT_MISMATCH"


class TestToolCalls:
    @staticmethod
    def called(arguments: Any) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    @pytest.mark.parametrize("arguments", ['{"x": 1, "y": null}', {"x": 1, "y": None}])
    def test_arguments_are_decoded_once_and_keep_their_nulls(self, arguments: Any) -> None:
        group = read({**PAIR, "chosen": [self.called(arguments)]})
        assert group.completions[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}

    @pytest.mark.parametrize("arguments", ["x = 1", "[1]", "3", '{"x": '])
    def test_arguments_that_are_no_object_are_a_bad_message(self, arguments: str) -> None:
        assert reason({**PAIR, "chosen": [self.called(arguments)]}) == "BAD_MESSAGE"

    def test_a_table_drops_the_fields_that_only_other_rows_have(self, tmp_path: Path) -> None:
        calls = [[self.called({"x": 1})], [self.called({"y": 2})]]
        table = pa.table({"prompt": [PAIR["prompt"]] * 2, "chosen": calls, "rejected": [PAIR["rejected"]] * 2})
        pq.write_table(table, tmp_path / "a.parquet")
        source = DataConfig.model_validate({"train": str(tmp_path / "a.parquet")}).train
        rows = [row for batch in read_batches(pieces(list_shards("train", source)[0])[0], 10) for _, row in batch]
        found = [read(row).completions[0]["tool_calls"][0]["function"]["arguments"] for row in rows]
        assert found == [{"x": 1}, {"y": 2}]

    def test_turns_of_ms_swift_are_calls_and_answers_of_tools(self) -> None:
        turns = [
            user("u"),
            {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
            {"role": "tool_response", "content": "ok"},
        ]
        group = read({**PAIR, "prompt": turns})
        assert [m["role"] for m in group.prompt] == ["user", "assistant", "tool"]
        assert group.prompt[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


class TestWhatStandsBesideThePrompt:
    HH = "\n\nHuman: q\n\nAssistant:"

    @pytest.mark.parametrize(
        "row",
        [
            {"chosen": f"{HH} a", "rejected": f"{HH} b"},
            {"chosen": "q a", "rejected": "q b"},
            {"prompt": f"{HH} ", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
            {
                "context": [user("q")],
                "completions": [{"rank": i, "completion": [answer(t)]} for i, t in enumerate("ab")],
            },
        ],
        ids=["hh", "implicit text", "ranked transcript", "nemo"],
    )
    def test_every_layout_has_a_system_text(self, row: dict[str, Any]):
        group = paired(read({**row, "system": "Be kind."}), PairingConfig())
        assert said(group) == ((system("Be kind."), user("q")), ("a", "b"))
        renamed = read({**row, "persona": "Be kind."}, system="persona")
        assert said(renamed)[0] == (system("Be kind."), user("q"))
        assert "Be kind." in str(group.prompt)  # what a template `plain` writes

    def test_a_transcript_has_one_system_text(self):
        row = {"chosen": f"Be kind.{self.HH} a", "rejected": f"Be kind.{self.HH} b"}
        assert read({**row, "system": "Be kind."}) == read(row)
        assert reason({**row, "system": "Be brief."}) == "PROMPT_MISMATCH"
        assert reason({"chosen": f"{self.HH} a", "rejected": f"{self.HH} b", "system": "\n\nHuman: x"}) == "BAD_MESSAGE"

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "completion": "a", "label": True},
            {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]},
            {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1},
            {"question": "q", "chosen": "a", "rejected": "b"},
            {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
        ],
    )
    @pytest.mark.parametrize("beside", [{"history": [["hi", "hello"]]}, {"input": "this text"}, {"query": "this text"}])
    def test_history_and_input_are_read_or_a_fault(self, row: dict[str, Any], beside: dict[str, Any]):
        assert reason({**row, **beside}) == "UNKNOWN_FORMAT"
        assert read({**row, **dict.fromkeys(beside)}) == read(row)
        assert read({**row, "input": "q", "history": []}) == read(row)  # the prompt holds it

    def test_a_recipe_that_names_the_prompt_has_chosen(self):
        row = {"prompt": "q", "input": "this text", "chosen": "a", "rejected": "b"}
        assert read(row, prompt="prompt").prompt == read(row, "text").prompt == "q"

    @pytest.mark.parametrize("prompt", [{"role": "user", "content": "r"}, 3, True])
    def test_a_prompt_of_another_kind_beside_conversations_is_a_fault(self, prompt: Any):
        row = published_row("trl_conversational_implicit")
        assert reason({**row, "prompt": prompt}) == "WRONG_TYPE"

    def test_an_input_follows_the_last_turn_of_the_user(self):
        row = {**published_row("pandalm"), "input": "this text"}
        asked = read({**row, "instruction": [{**user("q"), "name": "ann"}]}).prompt
        assert asked == ({**user("q\n\nthis text"), "name": "ann"},)
        assert read({**row, "instruction": []}).prompt == "this text"
        assert reason({**row, "instruction": [user("q"), answer("a")]}) == "PROMPT_MISMATCH"


def test_reasoning_beside_the_text_of_a_completion_is_part_of_it():
    items = [{"response": "a", "reasoning_content": "hm", "score": 1}, {"response": "b", "score": 2}]
    assert read({"prompt": "q", "completions": items}).completions == ({**answer("a"), "reasoning_content": "hm"}, "b")
    items[0]["response"] = [answer("a")]
    assert reason({"prompt": "q", "completions": items}) == "BAD_MESSAGE"


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}"
END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BARE = TURNS.replace("%s", "{{ m.content }}") + END
CALLS, NAMES = (
    "{{ m.tool_calls | tojson if m.tool_calls }}",
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
)
THINKING = "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
WITH_CALLS = "{{ tools | tojson if tools }}" + TURNS.replace("%s", "{{ m.content }}" + CALLS) + END
NAMES_ALONE = "{{ tools | tojson if tools }}" + TURNS.replace("%s", "{{ m.content }}" + NAMES) + END
LAST_THOUGHT = TURNS.replace("%s", THINKING + "{{ m.content }}") + END
NO_SYSTEM = TURNS.replace("%s", "{{ m.content if m.role != 'system' }}") + END
CUTS_THOUGHTS = TURNS.replace("%s", "{{ m.content.split('</think>')[-1] }}") + END
AS_PYTHON = TURNS.replace("%s", "{{ m.content }}{{ m.tool_calls if m.tool_calls }}") + END
AS_JSON_TEXT = TURNS.replace("%s", "{{ m.content }}{{ m.tool_calls | tojson | tojson if m.tool_calls }}") + END
NAMES_OF_USERS = TURNS.replace("%s", "{{ m.name if m.role == 'user' }} {{ m.content }}") + END
ONE_CALL = TURNS.replace("%s", "{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls }}") + END
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TWO_CALLS = {
    **CALL,
    "tool_calls": [*CALL["tool_calls"], {"type": "function", "function": {"name": "look_up", "arguments": {}}}],
}
QUOTED = {**CALL, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 'a "b"\n\'é'}}}]}
TOLD, ANN = {"role": "tool", "content": "1"}, {**user("q"), "name": "ann"}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}


class TestTemplates:
    @pytest.mark.parametrize(
        ("template", "group", "part"),
        [
            (BARE, TextGroup("q", (CALL, "no"), (1.0, 0.0)), "tool calls"),
            (NAMES_ALONE, TextGroup("q", (CALL, "no"), (1.0, 0.0)), "arguments of tool calls"),
            (BARE, TextGroup((user("q"), CALL, {"role": "tool", "content": "1"}), ("a", "b"), (1.0, 0.0)), "tool calls"),
            (BARE, TextGroup("q", ("a", "b"), (1.0, 0.0), tools=(TOOL,)), "tools"),
            (BARE, TextGroup(({**user("q"), "name": "ann"},), ("a", "b"), (1.0, 0.0)), "names of speakers"),
            (BARE, TextGroup("q", (THOUGHT, "no"), (1.0, 0.0)), "reasoning of the answer"),
            (LAST_THOUGHT, TextGroup((user("q"), THOUGHT, user("r")), ("a", "b"), (1.0, 0.0)), "reasoning of earlier turns"),
            (LAST_THOUGHT, TextGroup("q", ({**THOUGHT, "thinking": "two more"}, "no"), (1.0, 0.0)), "reasoning of the assistant"),
            (LAST_THOUGHT, TextGroup("q", ({**THOUGHT, "reasoning": "two more"}, "no"), (1.0, 0.0)), "reasoning of the assistant"),
            (NAMES_OF_USERS, TextGroup((ANN, {**answer("x"), "name": "bob"}, ANN), ("a", "b"), (1.0, 0.0)), "name of the assistant"),
            (WITH_CALLS, TextGroup((user("q"), CALL, {**TOLD, "name": "look_up"}), ("a", "b"), (1.0, 0.0)), "name of the tool"),
            (ONE_CALL, TextGroup("q", (TWO_CALLS, "no"), (1.0, 0.0)), "name of a tool call"),
            ("plain", TextGroup((user("q"), {**TOLD, "name": "look_up"}), ("a", "b"), (1.0, 0.0)), "names of speakers"),
            (NO_SYSTEM, TextGroup((SYSTEM, user("q")), ("a", "b"), (1.0, 0.0)), "a message with the role system"),
            (CUTS_THOUGHTS, TextGroup("q", ("<think> x </think> a", "b"), (1.0, 0.0)), "a message with the role assistant"),
            ("plain", TextGroup("q", (CALL, "no"), (1.0, 0.0)), "tool calls"),
            ("plain", TextGroup("q", (THOUGHT, "no"), (1.0, 0.0)), "reasoning"),
            ("plain", TextGroup(({**user("q"), "name": "ann"},), ("a", "b"), (1.0, 0.0)), "names of speakers"),
            ("plain", TextGroup("q", ("a", "b"), (1.0, 0.0), tools=(TOOL,)), "tools"),
        ],
    )  # fmt: skip
    def test_what_a_template_does_not_write_is_refused(
        self, template: str, group: TextGroup, part: str, chatml_dir: str
    ) -> None:
        rejected = self.tokenized(template, group, chatml_dir)
        assert isinstance(rejected, Rejected)
        assert rejected.reason == "DROPPED_BY_TEMPLATE"
        assert part in rejected.detail
        assert "template" in rejected.detail
        if template != "plain":
            assert isinstance(
                self.tokenized(template, group, chatml_dir, dropped_content="keep"), TokenGroup | Rejected
            )

    @pytest.mark.parametrize(
        ("template", "group"),
        [
            (BARE, TextGroup((SYSTEM, user("q")), ("a", "b"), (1.0, 0.0))),
            (BARE, TextGroup("  q\n", ("a ", " b"), (1.0, 0.0))),
            (WITH_CALLS, TextGroup("q", (CALL, "no"), (1.0, 0.0), tools=(TOOL,))),
            (
                WITH_CALLS,
                TextGroup((user("q"), CALL, {"role": "tool", "content": "1", "name": "f"}), ("a", "b"), (1.0, 0.0)),
            ),
            (LAST_THOUGHT, TextGroup("q", (THOUGHT, "no"), (1.0, 0.0))),
            (LAST_THOUGHT, TextGroup("q", ({**THOUGHT, "thinking": "two and two"}, "no"), (1.0, 0.0))),
            (AS_PYTHON, TextGroup("q", (QUOTED, "no"), (1.0, 0.0))),
            (AS_JSON_TEXT, TextGroup("q", (QUOTED, "no"), (1.0, 0.0))),
            (TURNS.replace("%s", "{{ m.content | tojson }}") + END, TextGroup('say "é"\n', ("a\nb", "c"), (1.0, 0.0))),
            (CUTS_THOUGHTS, TextGroup("q", ("a", "b"), (1.0, 0.0))),
        ],
    )
    def test_what_it_writes_is_admitted(self, template: str, group: TextGroup, chatml_dir: str) -> None:
        assert isinstance(self.tokenized(template, group, chatml_dir), TokenGroup)

    @staticmethod
    def tokenized(template: str, group: TextGroup, chatml_dir: str, **rules: str) -> TokenGroup | Rejected:
        config = DataConfig.model_validate({"train": "rows.jsonl", "rules": {"special_tokens": "allow", **rules}})
        (result,) = tokenized_groups([group], load_tokenizer(chatml_dir), template, config)
        return result
