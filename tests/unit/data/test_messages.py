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


class TestAllThatAMessageSays:
    @pytest.mark.parametrize(
        "call",
        [
            {"function": {"name": "f", "parameters": {"x": 1}}},
            {"function": {"name": "f", "parameters": '{"x": 1}'}},
            {"function": {"name": "f", "arguments": {"x": 1}, "parameters": None}},
        ],
    )
    def test_parameters_of_a_call_are_its_arguments(self, call: dict[str, Any]):
        group = read({"prompt": "q", "chosen": {**answer("a"), "tool_calls": [call]}, "rejected": answer("b")})
        assert group.completions[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}

    def test_a_call_without_the_object_around_it_is_decoded_too(self):
        bare = {"name": "f", "arguments": '{"x": 1}'}
        group = read({"prompt": "q", "chosen": {**answer("a"), "tool_calls": [bare]}, "rejected": answer("b")})
        assert group.completions[0]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]

    def test_a_single_function_call_is_a_tool_call(self):
        """OpenAI's earlier interface."""
        old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
        group = read({"prompt": "q", "chosen": old, "rejected": answer("b")})
        expected = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
        assert group.completions[0] == {**answer(""), "tool_calls": expected}

    @pytest.mark.parametrize(
        "extra",
        [
            {"function_call": {"name": "f"}, "tool_calls": [CALL]},
            {"function_call": "f()"},
            {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}, "parameters": {"y": 1}}}]},
            {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            {"tools": [{"name": "f"}]},
            {"refusal": "I cannot."},
            {"value": "other text"},
        ],
    )
    def test_what_is_said_twice_or_not_read_is_a_bad_message(self, extra: dict[str, Any]):
        assert reason({"prompt": "q", "chosen": {**answer("a"), **extra}, "rejected": answer("b")}) == "BAD_MESSAGE"

    def test_a_call_as_text_keeps_what_stands_beside_it(self):
        call = {"from": "function_call", "value": '{"name": "f", "parameters": {"x": 1}}', "reasoning": "hm"}
        row = {"conversations": [{"from": "human", "value": "q"}], "chosen": call, "rejected": answer("b")}
        assert read(row).completions[0] == {
            **answer(""),
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        }
        assert reason({**row, "chosen": {**call, "tool_calls": [CALL]}}) == "BAD_MESSAGE"

    def test_reasoning_has_one_name(self):
        thought = {**answer("a"), "reasoning": "hm"}  # as in vLLM's answers
        assert read({"prompt": "q", "chosen": thought, "rejected": answer("b")}).completions[0] == {
            **answer("a"),
            "reasoning_content": "hm",
        }
        twice = {**thought, "reasoning_content": "well"}
        assert read({"prompt": "q", "chosen": twice, "rejected": answer("b")}).completions[0] == twice

    @pytest.mark.parametrize("key", ["images", "image", "audio", "video_url"])
    def test_media_within_a_message_are_named(self, key: str):
        row = {"prompt": [{**user("q"), key: ["cat.png"]}], "chosen": "a", "rejected": "b"}
        assert reason(row) == "UNSUPPORTED_MEDIA"
        assert read({**row, "prompt": [{**user("q"), key: []}]}).prompt == (user("q"),)

    def test_decoded_arguments_are_sound_text(self):
        calls = [{"function": {"name": "f", "arguments": json.dumps({"x": "\x1b[2J"})}}]
        row = {"prompt": "q", "chosen": {**answer("a"), "tool_calls": calls}, "rejected": answer("b")}
        assert reason(row) == "CONTROL_CHARS"

    @pytest.mark.parametrize("speaker", [["human"], {"a": 1}, None, 3])
    def test_a_speaker_that_is_no_text_is_a_bad_role(self, speaker: Any):
        turns = [{"from": speaker, "value": "q"}]
        assert reason({"conversations": turns, "chosen": answer("a"), "rejected": answer("b")}) == "BAD_ROLE"


@pytest.mark.parametrize(
    "row",
    [
        {"images": "deep", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": [{"type": "deep", "text": "q"}]}], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion": "a", "label": "deep"},
        {"prompt": "q", "completions": ["a", "b"], "scores": ["deep", 1]},
        {"prompt": "q", "response_0": "a", "response_1": "b", "winner": "deep"},
        {"prompt": "q", "chosen": "deep", "rejected": "b"},
        {"prompt": [{**user("q"), "name": "deep"}], "chosen": "a", "rejected": "b"},
    ],
)
def test_what_is_nested_too_deeply_has_a_reason(row: dict[str, Any]):
    for deep in (json.loads("[" * 950 + "1" + "]" * 950), json.loads('{"a":' * 950 + "1" + "}" * 950)):
        reason(with_value(row, deep))


def with_value(value: Any, deep: Any) -> Any:
    """Put a deep value where the text `deep` stands."""
    if isinstance(value, dict):
        return {k: with_value(v, deep) for k, v in value.items()}
    if isinstance(value, list):
        return [with_value(v, deep) for v in value]
    return deep if value == "deep" else value
