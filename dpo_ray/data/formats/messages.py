"""Messages: conversations as lists of turns, with the completion as the last turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Conversation, Message

from .fields import Fields
from .soundness import require, sound_text, sound_value

ROLES = ("system", "developer", "user", "assistant", "tool")
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What chat templates read from a message in addition to its role and content."""

# ShareGPT's roles as LLaMA-Factory defines them (data/README.md there, "tags"), and the usual names.
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    **{role: role for role in ROLES},
}


def conversation(value: Any, name: str) -> Conversation:
    """Read a list of messages, `{role, content}` or `{from, value}`.

    Raises:
        Rejected: WRONG_TYPE, BAD_MESSAGE or BAD_ROLE, or the reason why a text is not sound.
    """
    if not isinstance(value, list | tuple):
        raise Rejected("WRONG_TYPE", f"`{name}` is {type(value).__name__}, not a list of messages")
    return tuple([_message(message, i, name) for i, message in enumerate(value)])


def _message(message: Any, i: int, name: str) -> Message:
    if type(message) is dict and len(message) == 2:  # fast path: nearly all of millions have only role and content
        role, content = message.get("role"), message.get("content")
        if type(role) is str and role in ROLES and type(content) is str:
            sound_text(content, name)
            return message
    where = f"`{name}`, message {i}"
    if isinstance(message, Mapping) and "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise Rejected("BAD_MESSAGE", f"{where}: no role")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise Rejected("BAD_ROLE", f"{where}: role {role!r}"[:200])
    calls = message.get("tool_calls")
    require(not calls or _is_list_of_objects(calls), "BAD_MESSAGE", f"{where}: tool_calls are not a list of objects")
    if content is None and role == "assistant" and calls:
        content = ""  # many templates would print None as text
    require(isinstance(content, str), "BAD_MESSAGE", f"{where}: no text content")
    kept = {key: sound_value(message[key], name, "BAD_MESSAGE") for key in KEPT if message.get(key)}
    return {"role": role, "content": sound_text(content, name), **kept}


def _from_sharegpt(message: Mapping[str, Any], where: str) -> Message:
    speaker, value = message["from"], message.get("value")
    if speaker not in _SHAREGPT_ROLES:
        raise Rejected("BAD_ROLE", f"{where}: from {speaker!r}"[:200])
    role = _SHAREGPT_ROLES[speaker]
    if speaker == "function_call":
        return {"role": role, "content": None, "tool_calls": _function_calls(value, where)}
    return {**message, "role": role, "content": value}


def _function_calls(value: Any, where: str) -> list[Message]:
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
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments") or {}}} for c in calls]


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def answer(value: Any, name: str) -> str | Message:
    """Read a completion: text, the assistant's message, or a list that contains only that message."""
    if isinstance(value, str):
        return sound_text(value, name)
    return only_turn(conversation([value] if isinstance(value, Mapping) else value, name), name)


def only_turn(turns: Conversation, name: str) -> str | Message:
    """Return the completion from a conversation of one message."""
    completion = last_turn(turns, name)
    if len(turns) != 1:
        raise Rejected("PROMPT_MISMATCH", f"`{name}` holds {len(turns)} turns beside an explicit prompt")
    return completion


def last_turn(turns: Conversation, name: str) -> str | Message:
    """Return the completion at the end of a conversation: its text, or the message if that contains more than text."""
    if not turns:
        raise Rejected(f"EMPTY_{name.upper()}", f"`{name}` has no messages")
    last = turns[-1]
    if last["role"] != "assistant":
        raise Rejected("LAST_TURN_NOT_ASSISTANT", f"`{name}` ends with {last['role']}")
    return last["content"] if last.keys() == {"role", "content"} else last


def prompt_of(fields: Fields) -> str | Conversation:
    """Read an explicit prompt, text or messages, with the system text if the row has one."""
    value = fields.need("prompt", "MISSING_PROMPT")
    name = fields.column("prompt")
    prompt = conversation(value, name) if isinstance(value, list | tuple) else sound_text(value, name)
    return with_system(prompt, fields)


def with_system(prompt: str | Conversation, fields: Fields) -> str | Conversation:
    """Put the row's system text, if there is any, before a prompt that does not begin with a system message."""
    system = fields.get("system")
    if system is None or not sound_text(system, fields.column("system")).strip():
        return prompt
    turns = user_turn(prompt) if isinstance(prompt, str) else prompt
    if turns and turns[0]["role"] in ("system", "developer"):
        return turns
    return ({"role": "system", "content": system}, *turns)


def user_turn(text: str) -> Conversation:
    """Build a conversation that consists of one user turn."""
    return ({"role": "user", "content": text},)


def check_alternation(turns: Conversation) -> None:
    """Check that no two turns of the user, or of the assistant, follow each other; a completion follows the last turn.

    A tool's turn comes between two turns of the assistant; system and developer messages are not part of the dialogue.

    Raises:
        Rejected: NON_ALTERNATING_ROLES.
    """
    spoken = [turn["role"] for turn in turns if turn["role"] not in ("system", "developer")]
    for before, after in zip(spoken, [*spoken[1:], "assistant"], strict=False):
        if before == after != "tool":
            raise Rejected("NON_ALTERNATING_ROLES", f"two turns of the {before} in a row")
