"""Converts the tool calls of messages, which have several forms, to the objects that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message

from .soundness import require, sound_value


def tool_calls(message: Mapping[str, Any], where: str) -> list[Message]:
    """Return the calls of a message: its `tool_calls`, or the single `function_call` of OpenAI's earlier interface.

    Raises:
        Rejected: BAD_MESSAGE, WRONG_TYPE or INVALID_UTF8.
    """
    calls, single = message.get("tool_calls"), message.get("function_call")
    if single:
        require(not calls, "BAD_MESSAGE", f"{where}: the message has both tool_calls and function_call")
        require(isinstance(single, Mapping), "BAD_MESSAGE", f"{where}: function_call is not an object")
        calls = [{"type": "function", "function": single}]
    if not calls:
        return []
    listed = isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)
    require(listed, "BAD_MESSAGE", f"{where}: tool_calls are not a list of objects")
    return [sound_value(_with_arguments(call, where), where, "BAD_MESSAGE") for call in calls]


def calls_of_text(value: Any, where: str) -> list[Message]:
    """Read the JSON text of a function call, or of a list of calls, each with name and arguments."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        raise Rejected("BAD_MESSAGE", f"{where}: the function call is not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    require(
        bool(calls) and all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls),
        "BAD_MESSAGE",
        f"{where}: the function call has no name",
    )
    return [{"type": "function", "function": {k: v for k, v in c.items() if k not in ("id", "type")}} for c in calls]


def _with_arguments(call: Mapping[str, Any], where: str) -> Message:
    """Return a tool call whose arguments are an object, and not JSON text.

    In some rows, name and arguments are keys of the call itself, and not of its `function`. vLLM decodes arguments in
    the same way before it renders a template: vllm/renderers/chat_utils.py, `_postprocess_messages`.
    """
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _function(function, where)}
    return _function(call, where) if "name" in call else dict(call)


def _function(function: Mapping[str, Any], where: str) -> Message:
    """Return the function of a tool call, with decoded arguments. In some rows the arguments are called `parameters`."""
    given = [name for name in ("arguments", "parameters") if function.get(name)]
    require(len(given) < 2, "BAD_MESSAGE", f"{where}: a tool call has both arguments and parameters")
    arguments = function[given[0]] if given else {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise Rejected("BAD_MESSAGE", f"{where}: the arguments of a tool call are not JSON") from None
    require(isinstance(arguments, Mapping), "BAD_MESSAGE", f"{where}: the arguments of a tool call are not an object")
    return {**{k: v for k, v in function.items() if k != "parameters"}, "arguments": arguments}
