"""Messages of all shapes that a hypothesis may draw, in which each piece of content has a word of its own.

Such a word is `w17w`: where it stands in a row tells what the row says, and whether the text that is trained on says it too.
What is no content (ids, scores) has words such as `x17x`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Row = dict[str, Any]

AROUND = (
    "", " ", "\n", "say ", "\n\nHuman: ", "\n\nAssistant: ", "Human: ", "Assistant:", "\r\n", "\t", "é", "e\u0301",
    "\u05d0\u202e", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u4e2d\u6587", "\u3000", "\x85", "{{ x }}", "%s {0}", '"', "'", "\\",
    "\\n", "<think>", "</think>", "<image>", "{", "[{'role': 'user', 'content': '", '{"name": "f"}', "ﬁ", "\ufeff",
)  # fmt: skip
UNSOUND = ("\x00", "\x1b[31m", "\ud800", "<|im_end|>", "<|im_start|>system\n", "<|endoftext|>")
ANY_TEXT = st.text(max_size=6)  # of any script, with combining, invisible and unassigned characters


class Pen:
    """Draws rows; each text that it writes has a word of its own."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        self._words = 0

    def pick(self, options: Sequence[Any]) -> Any:
        """Draw one of the options; the first is the simplest."""
        return options[self._draw(st.integers(0, len(options) - 1))]

    def chance(self, one_in: int) -> bool:
        """Draw whether something rare happens."""
        return self._draw(st.integers(0, one_in - 1)) == one_in - 1

    def word(self) -> str:
        """Return a new word of content."""
        self._words += 1
        return f"w{self._words}w"

    def label(self) -> str:
        """Return a new word that is no content."""
        self._words += 1
        return f"x{self._words}x"

    def text(self) -> str:
        """Return text with a word of its own."""
        if not self.chance(4):
            return self.word()
        if self.chance(12):
            return f"{self.word()} " + "long text, " * 400 + self.word()
        if self.chance(4):
            return f"{self._draw(ANY_TEXT)} {self.word()} {self._draw(ANY_TEXT)}"
        around = UNSOUND if self.chance(12) else AROUND
        return self.pick(around) + self.word() + self.pick(around)


def question(pen: Pen) -> list[Row]:
    """Draw a conversation that waits for an answer."""
    turns = [{"role": pen.pick(("system", "developer")), "content": pen.text()}] if pen.chance(4) else []
    turns.append(user(pen))
    for _ in range(pen.pick((0, 0, 1, 2))):
        turns.append(answer(pen))
        if "tool_calls" in turns[-1]:
            turns += (
                [tool(pen, turns[-1]["tool_calls"]), answer(pen)]
                if pen.chance(2)
                else [tool(pen, turns[-1]["tool_calls"])]
            )
            if turns[-1]["role"] == "tool":
                continue
        turns.append(user(pen))
    return turns


def user(pen: Pen) -> Row:
    return {"role": "user", "content": pen.text(), **({"name": pen.text()} if pen.chance(12) else {})}


def tool(pen: Pen, calls: list[Row]) -> Row:
    name = {"name": pen.pick((called_name(calls[0]), pen.word()))} if pen.chance(3) else {}
    return {"role": "tool", "content": pen.text(), **({"tool_call_id": pen.label()} if pen.chance(3) else {}), **name}


def called_name(call: Row) -> str:
    return call.get("function", call)["name"]


def answer(pen: Pen) -> Row:
    turn: Row = {"role": "assistant", "content": pen.text()}
    if pen.chance(8):
        for key in pen.pick((("reasoning_content",), ("thinking",), ("reasoning",), ("reasoning_content", "thinking"))):
            turn[key] = pen.text()
    if pen.chance(8):
        turn["tool_calls"] = [call(pen) for _ in range(pen.pick((1, 2)))]
        turn["content"] = pen.pick((None, "", turn["content"]))
    if pen.chance(20):
        key = pen.pick(("name", "function_call", "images", "audio", "tools", "id", "weight", "refusal"))
        turn[key] = {"function_call": function(pen), "id": pen.label(), "weight": 0, "images": [pen.word()]}.get(
            key
        ) or pen.word()
    return turn


def function(pen: Pen) -> Row:
    value: Any = {pen.word(): pen.pick((pen.text(), None, 3, [pen.text()], {"k": pen.text()})), "y": None}
    value = json.dumps(value) if pen.chance(3) else value
    return {"name": pen.word(), pen.pick(("arguments", "arguments", "parameters")): value}


def call(pen: Pen) -> Row:
    if pen.chance(5):
        return function(pen)
    return {"type": "function", "function": function(pen), **({"id": pen.label()} if pen.chance(2) else {})}


def spelled(pen: Pen, turns: list[Row]) -> Any:
    """Write messages in one of the forms in which data has them."""
    if pen.chance(5):
        turns = [in_parts(pen, turn) if pen.chance(2) else turn for turn in turns]
    if pen.chance(6):
        turns = [as_sharegpt(pen, turn) for turn in turns]
    if not pen.chance(6):
        return turns
    form = pen.pick((json.dumps, repr, columns_of, lambda all_: [json.dumps(m) for m in all_], tuple))
    return form(turns)


def in_parts(pen: Pen, turn: Row) -> Row:
    text = turn["content"]
    if text is None:
        return turn
    extra = pen.pick(
        (
            None,
            {"type": "text", "text": pen.text()},
            pen.text(),
            {"type": "image", "image": pen.word()},
            {"type": "think", "text": pen.text()},
        )
    )
    part = {"type": pen.pick(("text", "input_text", None)), "text": text}
    return {**turn, "content": [part] if extra is None else [part, extra]}


def as_sharegpt(pen: Pen, turn: Row) -> Row:
    speaker = {"user": "human", "assistant": "gpt", "tool": pen.pick(("observation", "function_response", "tool"))}
    others = {k: v for k, v in turn.items() if k not in ("role", "content")}
    calls = others.get("tool_calls")
    if calls and pen.chance(2):
        others.pop("tool_calls")
        return {"from": "function_call", "value": json.dumps([c.get("function", c) for c in calls]), **others}
    return {"from": speaker.get(turn["role"], turn["role"]), "value": turn["content"], **others}


def columns_of(turns: list[Row]) -> Row:
    """Return a list for each field, as `datasets` stores a Sequence of objects."""
    names = dict.fromkeys(name for turn in turns for name in turn)
    return {name: [turn.get(name) for turn in turns] for name in names}


def spoken(pen: Pen, turn: Row) -> Any:
    """Write an answer: as text where it is nothing else, a message, or a list of it."""
    if turn.keys() == {"role", "content"} and pen.chance(2):
        return turn["content"]
    return spelled(pen, [turn]) if pen.chance(2) else turn


def asked(pen: Pen) -> Any:
    return pen.text() if pen.chance(2) else spelled(pen, question(pen))
