"""Reads conversations that are lists of messages. A message is one turn of the user, the assistant or a tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Conversation, Message

from .fields import Fields
from .media import is_media
from .soundness import require, sound_text, sound_value
from .tool_calls import calls_of_text, tool_calls

ROLES = ("system", "developer", "user", "assistant", "tool")
KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""The keys of a message that chat templates read, besides role, content and tool calls."""

UNREAD = ("tools", "functions", "documents", "refusal")
"""Keys of a message whose values templates do not get. A message that has one of these keys is rejected."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""The types of a part that is text, if the content of a message is a list of parts. `text` is the type in chat
templates, and the others are types in OpenAI's Responses API."""

# ShareGPT's roles as LLaMA-Factory defines them (data/README.md there, "tags"), and the usual names.
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_response": "tool",
    **{role: role for role in ROLES},
}
CALLS = ("function_call", "tool_call")
"""The speakers (values of `from`) whose text is a tool call as JSON, in the layouts of ShareGPT and ms-swift."""


def conversation(value: Any, name: str) -> Conversation:
    """Read a list of messages, each of the form `{role, content}` or `{from, value}`.

    Raises:
        Rejected: WRONG_TYPE, BAD_MESSAGE, BAD_ROLE, UNSUPPORTED_MEDIA or INVALID_UTF8.
    """
    if not isinstance(value, list | tuple):
        raise Rejected("WRONG_TYPE", f"`{name}` is {type(value).__name__}, not a list of messages")
    return tuple([_message(message, i, name) for i, message in enumerate(value)])


def _message(message: Any, i: int, name: str) -> Message:
    if type(message) is dict and len(message) == 2:  # fast path: nearly all messages have only role and content
        role, content = message.get("role"), message.get("content")
        if type(role) is str and role in ROLES and type(content) is str:
            sound_text(content, name)
            return message
    where = f"`{name}`, message {i}"
    if isinstance(message, Mapping):
        _check_all_is_read(message, where)
    if isinstance(message, Mapping) and "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise Rejected("BAD_MESSAGE", f"{where}: the message has no role")
    if message["role"] in ("tool_call", "tool_response"):
        message = _from_sharegpt({**message, "from": message["role"], "value": message.get("content")}, where)
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise Rejected("BAD_ROLE", f"{where}: the role {role!r} is not supported"[:200])
    calls = tool_calls(message, where)
    if content is None and role == "assistant" and calls:
        content = ""  # many templates would print None as text
    text = _text_of(content, where)
    kept = {key: sound_value(message[key], name, "BAD_MESSAGE") for key in KEPT if message.get(key)}
    if "reasoning_content" not in kept and "reasoning" in kept:  # the same in vLLM, whose name is the shorter one
        kept["reasoning_content"] = kept.pop("reasoning")
    return {"role": role, "content": sound_text(text, name), **kept, **({"tool_calls": calls} if calls else {})}


def _check_all_is_read(message: Mapping[str, Any], where: str) -> None:
    content, value = message.get("content"), message.get("value")
    twice = content is not None and value is not None and content != value
    require(not twice, "BAD_MESSAGE", f"{where}: `content` and `value` differ")
    for key, value in message.items():
        if value and isinstance(key, str) and is_media(key):
            raise Rejected("UNSUPPORTED_MEDIA", f"{where}: the message has `{key}`")
        require(
            not value or key not in UNREAD, "BAD_MESSAGE", f"{where}: the key `{key}` of the message is not supported"
        )


def _text_of(content: Any, where: str) -> str:
    """Return the text of a message. Content that is a list of parts is joined without separators, as in chat templates.

    Raises:
        Rejected: BAD_MESSAGE, if there is no text; UNSUPPORTED_MEDIA, if a part is an image, a video or sound.
    """
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, Mapping) else content
    require(isinstance(parts, list | tuple) and bool(parts), "BAD_MESSAGE", f"{where}: the message has no text content")
    return "".join([part if isinstance(part, str) else _part_text(part, where) for part in parts])


def _part_text(part: Any, where: str) -> str:
    require(isinstance(part, Mapping), "BAD_MESSAGE", f"{where}: a part of the content is not an object")
    kind = part.get("type") or "text"
    if kind not in TEXT_PARTS:
        raise Rejected("UNSUPPORTED_MEDIA", f"{where}: the content has a part of the type {kind!r}"[:200])
    media = sorted(key for key, value in part.items() if value and is_media(str(key)))
    if media:
        raise Rejected("UNSUPPORTED_MEDIA", f"{where}: a part of the content has `{media[0]}`"[:200])
    text = part.get("text", part.get("content"))
    require(isinstance(text, str), "BAD_MESSAGE", f"{where}: a text part of the content has no text")
    return text


def _from_sharegpt(message: Mapping[str, Any], where: str) -> Message:
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise Rejected("BAD_ROLE", f"{where}: the speaker {speaker!r} is not supported"[:200])
    role = _SHAREGPT_ROLES[speaker]
    others = {k: v for k, v in message.items() if k not in ("from", "value")}
    if speaker in CALLS:
        require(
            not message.get("tool_calls"), "BAD_MESSAGE", f"{where}: the message from {speaker} also has tool_calls"
        )
        return {**others, "role": role, "content": None, "tool_calls": calls_of_text(value, where)}
    return {**others, "role": role, "content": value}


def answer(value: Any, name: str) -> str | Message:
    """Read a completion: text, the assistant's message, or a list that contains only that message."""
    if isinstance(value, str):
        return sound_text(value, name)
    return only_turn(conversation([value] if isinstance(value, Mapping) else value, name), name)


def only_turn(turns: Conversation, name: str) -> str | Message:
    """Return the completion, which must be the only message of the conversation."""
    completion = last_turn(turns, name)
    if len(turns) != 1:
        raise Rejected("PROMPT_MISMATCH", f"`{name}` holds {len(turns)} turns, although the row has a separate prompt")
    return completion


def last_turn(turns: Conversation, name: str) -> str | Message:
    """Return the completion at the end of a conversation: the text of the last message.

    If the last message contains more than text, such as tool calls, return the whole message.
    """
    if not turns:
        raise Rejected(f"EMPTY_{name.upper()}", f"`{name}` has no messages")
    last = turns[-1]
    if last["role"] != "assistant":
        raise Rejected("LAST_TURN_NOT_ASSISTANT", f"the last turn of `{name}` has the role {last['role']}")
    return last["content"] if last.keys() == {"role", "content"} else last


def prompt_of(fields: Fields) -> str | Conversation:
    """Read the row's prompt column (text or messages), with the row's system text before it if there is any."""
    value = fields.need("prompt", "MISSING_PROMPT")
    name = fields.column("prompt")
    prompt = conversation(value, name) if isinstance(value, list | tuple) else sound_text(value, name)
    return with_system(prompt, fields)


def with_system(prompt: str | Conversation, fields: Fields) -> str | Conversation:
    """Put the row's system text, if there is any, before the prompt, unless the prompt already begins with this text.

    Raises:
        Rejected: PROMPT_MISMATCH, if the prompt begins with another system message.
    """
    system = system_text(fields)
    if not system:
        return prompt
    turns = user_turn(prompt) if isinstance(prompt, str) else prompt
    if turns and turns[0]["role"] in ("system", "developer"):
        same = turns[0]["content"].strip() == system.strip()
        require(same, "PROMPT_MISMATCH", f"`{fields.column('system')}` is not the system message of the conversation")
        return turns
    return ({"role": "system", "content": system}, *turns)


def system_text(fields: Fields) -> str:
    """Return the row's system text; "" if there is none, or only white space."""
    system = fields.get("system")
    return "" if system is None or not sound_text(system, fields.column("system")).strip() else system


def user_turn(text: str) -> Conversation:
    """Build a conversation that consists of one user turn."""
    return ({"role": "user", "content": text},)


def check_alternation(turns: Conversation) -> None:
    """Check that turns of the user and of the assistant alternate. The completion counts as the last turn of the assistant.

    Several turns of tools may follow each other. System and developer messages are ignored.

    Raises:
        Rejected: NON_ALTERNATING_ROLES.
    """
    spoken = [turn["role"] for turn in turns if turn["role"] not in ("system", "developer")]
    for before, after in zip(spoken, [*spoken[1:], "assistant"], strict=False):
        if before == after != "tool":
            raise Rejected("NON_ALTERNATING_ROLES", f"there are two turns of the {before} in a row")
