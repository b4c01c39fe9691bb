"""What a chat template leaves out: a conversation is trained on only if its text holds every part of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message

Tools = Sequence[Mapping[str, Any]] | None
Render = Callable[[Sequence[Message], Tools], str]
REASONING = ("reasoning_content", "thinking")
_OTHER = "qzx"  # what a part is changed to: the text changes as well if the template writes it


class DropCheck:
    """The check that a template leaves out no part of a conversation.

    Once for each shape of a conversation, tool calls, tools, names and reasoning are changed in turn, and the
    conversation is rendered again: its text must change as well.

    Args:
        template: the name of the template, shown in the detail of a rejection.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._dropped: dict[Any, str] = {}  # by shape: the part that is left out, or ""

    def check(
        self, messages: Sequence[Message], tools: Tools, whole: str, unseen: Sequence[Message], render: Render
    ) -> None:
        """Check that `whole`, the text of the conversation, holds all of it.

        Args:
            unseen: the messages whose text was not found yet in the part of `whole` that several conversations share.
            render: renders other messages and tools in the same way; raises Rejected if the template refuses them.

        Raises:
            Rejected: DROPPED_BY_TEMPLATE.
        """
        for message in unseen:
            text = message["content"].strip()
            if text and text not in whole and not _is_written_otherwise(text, whole):
                raise self._rejected(f"the text of a turn of the {message['role']}")
        if tools or max(map(len, messages)) > 2:
            shape = _shape(messages, tools)
            if shape not in self._dropped:
                self._dropped[shape] = _first_dropped(messages, tools, whole, render)
            if self._dropped[shape]:
                raise self._rejected(self._dropped[shape])

    def _rejected(self, part: str) -> Rejected:
        return Rejected("DROPPED_BY_TEMPLATE", f"{self._template} does not write {part}")


def _is_written_otherwise(text: str, whole: str) -> bool:
    """Return whether the text is there as JSON writes it, or with other white space, such as around a thought."""
    if any(json.dumps(text, ensure_ascii=ascii_only)[1:-1] in whole for ascii_only in (False, True)):
        return True
    return "".join(text.split()) in "".join(whole.split())


def _shape(messages: Sequence[Message], tools: Tools) -> Any:
    """Return what can decide whether a template writes a part: who speaks, and which parts each message has."""
    return tuple((m["role"], bool(m["content"]), tuple(sorted(m))) for m in messages), bool(tools)


def _first_dropped(messages: Sequence[Message], tools: Tools, whole: str, render: Render) -> str:
    for part, changed, changed_tools in _changes(messages, tools):
        try:
            if render(changed, changed_tools) == whole:
                return part
        except Rejected:  # the template reads this part, and does not accept another value
            continue
    return ""


def _changes(messages: Sequence[Message], tools: Tools) -> Iterator[tuple[str, Sequence[Message], Tools]]:
    """Yield each part that the conversation has, and the conversation with that part changed everywhere it occurs."""
    *before, answer = messages
    if tools:
        yield "the tools", messages, [_changed_function(tool) for tool in tools]
    if any("tool_calls" in m for m in messages):
        yield "the names of tool calls", [_with_calls(m, _renamed) for m in messages], tools
        yield "the arguments of tool calls", [_with_calls(m, _with_other_arguments) for m in messages], tools
    if any("name" in m for m in messages if m["role"] != "tool"):  # a tool's name is that of the call before it
        yield "the names of speakers", [_changed(m, ("name",)) if m["role"] != "tool" else m for m in messages], tools
    if any(key in m for m in before for key in REASONING):
        yield "the reasoning of earlier turns", [*(_changed(m, REASONING) for m in before), answer], tools
    if any(key in answer for key in REASONING):
        yield "the reasoning of the answer", [*before, _changed(answer, REASONING)], tools


def _changed(message: Message, keys: Sequence[str]) -> Message:
    return {**message, **{key: f"{_OTHER} {message[key]}" for key in keys if isinstance(message.get(key), str)}}


def _with_calls(message: Message, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Message:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_within_function(call, change) for call in message["tool_calls"]]}


def _within_function(call: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Change a call's function, which some rows hold without the object around it."""
    return {**call, "function": change(call["function"])} if isinstance(call.get("function"), Mapping) else change(call)


def _renamed(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "name": f"{_OTHER}_{function.get('name', '')}"}


def _with_other_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    return {**function, "arguments": {**(arguments if isinstance(arguments, Mapping) else {}), _OTHER: _OTHER}}


def _changed_function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return _within_function(tool, _renamed)
