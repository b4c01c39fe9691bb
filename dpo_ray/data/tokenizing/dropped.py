"""Detects what a chat template leaves out. A conversation is only used if its rendered text contains all parts of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message

Tools = Sequence[Mapping[str, Any]] | None
Render = Callable[[Sequence[Message], Tools], str]
REASONING = ("reasoning_content", "reasoning", "thinking")
_OTHER = "qzx"  # inserted into a part to change it; if the template writes the part, the rendered text changes, too


class DropCheck:
    """Checks that a template leaves out no part of a conversation.

    The text of each message, and the texts of its name, reasoning and tool calls must occur in the rendered text. In
    addition, one conversation of each shape (`_shape`) is rendered again for each kind of part (tools, tool calls,
    names, reasoning), after all parts of this kind were changed. If the rendered text stays the same, the template
    leaves out the parts of this kind.

    Args:
        template: the name of the template, shown in the detail of a rejection.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._dropped: dict[Any, str] = {}  # by shape: the part that is left out, or ""

    def check(
        self, messages: Sequence[Message], tools: Tools, whole: str, unseen: Sequence[Message], render: Render
    ) -> None:
        """Check that `whole`, the rendered text of a conversation, contains all its parts.

        Args:
            unseen: the messages whose text the rendered prompt does not contain. Only these are searched in `whole`.
            render: renders changed messages and tools with the same template; raises Rejected if the template fails.

        Raises:
            Rejected: DROPPED_BY_TEMPLATE.
        """
        for message in unseen:
            if not _is_written(message["content"], whole):
                raise self._rejected(f"the text of a message with the role {message['role']}")
        if tools or max(map(len, messages)) > 2:
            shape = _shape(messages, tools)
            if shape not in self._dropped:
                self._dropped[shape] = _first_dropped(messages, tools, whole, render)
            if self._dropped[shape]:
                raise self._rejected(self._dropped[shape])
            for message in messages:
                for part, text in _texts_beside_content(message):
                    if not _is_written(text, whole):
                        raise self._rejected(f"{part} of the {message['role']}")

    def _rejected(self, part: str) -> Rejected:
        return Rejected("DROPPED_BY_TEMPLATE", f"{self._template} does not write {part}")


def _texts_beside_content(message: Message) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each text of a message besides its content. The name is used in the detail of a rejection."""
    for key, part in (("name", "the name"), *((key, "the reasoning") for key in REASONING)):
        if isinstance(message.get(key), str):
            yield part, message[key]
    for call in message.get("tool_calls", ()):
        function = call["function"] if isinstance(call.get("function"), Mapping) else call
        yield from (("the name of a tool call", text) for text in _strings(function.get("name")))
        yield from (("the arguments of a tool call", text) for text in _strings(function.get("arguments")))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for item in pair for text in _strings(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _strings(item))


def _is_written(text: str, whole: str) -> bool:
    """Return whether `whole` contains `text`: unchanged, escaped as in a JSON or Python string, or with other white space."""
    text = text.strip()
    if text in whole:
        return True
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        if once in whole or json.dumps(once, ensure_ascii=ascii_only)[1:-1] in whole:  # twice: arguments as JSON text
            return True
    if repr(text)[1:-1] in whole:
        return True
    return "".join(text.split()) in "".join(whole.split())


def _shape(messages: Sequence[Message], tools: Tools) -> Any:
    """Return the shape of a conversation: the role of each message, the parts that it has, and whether there are tools.

    Whether a template writes a part can depend on the shape, but not on the content of the parts.
    """
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
    """Yield (name, messages, tools) for each kind of part in the conversation.

    `name` is the kind of part. In `messages` and `tools`, the parts of this kind are changed.
    """
    *before, answer = messages
    if tools:
        yield "the tools", messages, [_changed_function(tool) for tool in tools]
    if any("tool_calls" in m for m in messages):
        yield "the names of tool calls", [_with_calls(m, _renamed) for m in messages], tools
        yield "the arguments of tool calls", [_with_calls(m, _with_other_arguments) for m in messages], tools
    if any("name" in m for m in messages if m["role"] != "tool"):  # a tool's message only repeats the name of its call
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
    """Apply `change` to the function of a tool call or tool. One without the key `function` is itself the function."""
    return {**call, "function": change(call["function"])} if isinstance(call.get("function"), Mapping) else change(call)


def _renamed(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "name": f"{_OTHER}_{function.get('name', '')}"}


def _with_other_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    return {**function, "arguments": {**(arguments if isinstance(arguments, Mapping) else {}), _OTHER: _OTHER}}


def _changed_function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return _within_function(tool, _renamed)
