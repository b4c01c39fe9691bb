"""Messages: what is kept of them, in which order they stand, and what of a row is no text that can be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.published_rows import answer, published_row, read, reason, system, user

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
TURNS = [
    {"role": "developer", "content": "Use tools.", "name": None, "weight": 0},
    {"role": "user", "content": "Hi", "name": "ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "f", "tool_call_id": "1", "content": "2"},
]


class TestMessages:
    def test_what_templates_read_is_kept(self):
        group = read({"prompt": TURNS, "chosen": [answer("a")], "rejected": [answer("b")]})
        assert group.prompt == (
            {"role": "developer", "content": "Use tools."},
            {"role": "user", "content": "Hi", "name": "ann"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},  # JSON's null is a value
            {"role": "tool", "content": "2", "name": "f", "tool_call_id": "1"},
        )

    def test_tools_and_template_variables(self):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "title": None}}}
        row = published_row("trl_conversational")
        for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
            assert read({**row, "tools": tools}).tools == (tool,)
        for tools in (None, [], ""):
            assert read({**row, "tools": tools}).tools is None
        for value in ({"enable_thinking": False, "x": None}, '{"enable_thinking": false, "x": null}'):
            assert read({**row, "chat_template_kwargs": value}).template_kwargs == {"enable_thinking": False, "x": None}

    @pytest.mark.parametrize(
        "extra", [{"tools": "weather"}, {"tools": {"a": 1}}, {"tools": [1]}, {"chat_template_kwargs": [1]}]
    )
    def test_bad_tools(self, extra: dict[str, Any]):
        assert reason({**published_row("trl_conversational"), **extra}) == "BAD_TOOLS"

    @pytest.mark.parametrize(
        "turns",
        [
            [user("a"), user("b")],
            [user("a"), system("x"), user("b")],
            [user("a"), answer("b"), answer("c"), user("d")],
            [user("a"), answer("b")],  # the completion would be a second turn of the assistant
        ],
    )
    def test_turns_that_do_not_alternate(self, turns: list[dict]):
        assert reason({"prompt": turns, "chosen": "c", "rejected": "d"}) == "NON_ALTERNATING_ROLES"

    @pytest.mark.parametrize(
        "turns",
        [
            [system("x")],
            [answer("Welcome."), user("a")],
            [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}],
        ],
    )
    def test_turns_that_alternate(self, turns: list[dict]):
        assert len(read({"prompt": turns, "chosen": "c", "rejected": "d"}).prompt) == len(turns)

    def test_transcripts_alternate_too(self):
        begin = "\n\nHuman: a\n\nHuman: b\n\nAssistant:"
        assert reason({"chosen": f"{begin} c", "rejected": f"{begin} d"}) == "NON_ALTERNATING_ROLES"

    @pytest.mark.parametrize("character", ["\x00", "\x0b", "\x1b", "\x7f"])
    def test_control_characters(self, character: str):
        assert reason({"prompt": "Hi", "chosen": f"a{character}", "rejected": "b"}) == "CONTROL_CHARS"
        assert reason({"prompt": [user(character)], "chosen": "a", "rejected": "b"}) == "CONTROL_CHARS"

    def test_white_space_and_what_is_beyond_ascii_is_sound(self):
        text = "a\tb\r\nc\x85\u2028é\U0001f600"
        assert read({"prompt": text, "chosen": text + "1", "rejected": text + "2"}).prompt == text

    def test_text_beside_the_content_is_sound_too(self):
        row = published_row("trl_conversational")
        calls = [{"function": {"name": "f", "arguments": {"x": "\ud800"}}}]
        turns = [user("a"), {**answer("b"), "tool_calls": calls}, user("c")]
        assert reason({**row, "prompt": turns}) == "INVALID_UTF8"
        assert reason({**row, "prompt": [{**user("a"), "name": "\x1b[2J"}]}) == "CONTROL_CHARS"
        assert reason({**row, "tools": [{"name": "\ud800"}]}) == "INVALID_UTF8"
        deep = json.loads('{"a":' * 100 + "1" + "}" * 100)
        assert reason({**row, "tools": [deep]}) == "BAD_TOOLS"
        assert reason({**row, "chat_template_kwargs": deep}) == "BAD_TOOLS"

    def test_calls_alone_are_no_empty_completion(self):
        call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        assert len(read({"prompt": [user("a")], "chosen": [call], "rejected": [answer("b")]}).completions) == 2
        bare = {"role": "assistant", "content": None}
        assert reason({"prompt": [user("a")], "chosen": [bare], "rejected": [answer("b")]}) == "BAD_MESSAGE"
