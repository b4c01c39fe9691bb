"""From a row, in any of the formats that people have, to a preference group of text or messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_ray.config.data import Columns, RowFormat

from .admission import Rejected

ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # white space at the very beginning is often stripped

Message = dict[str, str]
Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class TextGroup:
    """One prompt and its completions, best first, before rendering.

    `prompt` is text or messages; so are the completions (a message completion is the assistant's text alone).
    `messages` is the conversation that a text prompt stands for, for use with a chat template: the turns of HH-RLHF.
    With it, the white space between prompt and completion is the format's and does not go into the conversation.
    """

    prompt: str | Conversation
    completions: tuple[str, ...]
    scores: tuple[float, ...]
    messages: Conversation | None = None


def text_group(row: Mapping[str, Any], row_format: RowFormat, columns: Columns) -> TextGroup:
    """Read one row.

    Raises:
        Rejected: with the reason that fits best; the row is then quarantined.
    """
    chosen = _field(row, columns.chosen, "MISSING_CHOSEN")
    rejected = _field(row, columns.rejected, "MISSING_REJECTED")
    # A table has every column in every row: where the format takes no prompt, a null one is none.
    implicit = row_format in ("implicit_messages", "implicit_text", "hh")
    has_prompt = columns.prompt in row and not (implicit and row[columns.prompt] is None)
    prompt = _field(row, columns.prompt, "MISSING_PROMPT") if has_prompt else None
    if row_format == "auto":
        row_format = _recognise(prompt, chosen, rejected)
    match row_format:
        case "text":
            _require(has_prompt, "MISSING_PROMPT", f"no column `{columns.prompt}`")
            group = TextGroup(
                _text(prompt, columns.prompt), (_text(chosen, "chosen"), _text(rejected, "rejected")), (1.0, 0.0)
            )
        case "messages":
            _require(has_prompt, "MISSING_PROMPT", f"no column `{columns.prompt}`")
            group = _message_group(_conversation(prompt, "prompt"), chosen, rejected)
        case "implicit_messages":
            group = _implicit_messages(prompt, chosen, rejected)
        case "hh":
            group = _hh_group(_text(chosen, "chosen"), _text(rejected, "rejected"))
        case "implicit_text":
            group = _implicit_text(_text(chosen, "chosen"), _text(rejected, "rejected"))
    return _checked(group)


def _field(row: Mapping[str, Any], column: str, missing: str) -> Any:
    if column not in row:
        raise Rejected(missing, f"no column `{column}`; the row has: {', '.join(map(str, row))}"[:300])
    value = row[column]
    if value is None:
        raise Rejected("NULL_FIELD", f"`{column}` is null")
    return value


def _require(condition: bool, reason: str, detail: str) -> None:
    if not condition:
        raise Rejected(reason, detail)


def _recognise(prompt: Any, chosen: Any, rejected: Any) -> RowFormat:
    if isinstance(chosen, list | tuple) or isinstance(rejected, list | tuple):
        return "messages" if isinstance(prompt, list | tuple) else "implicit_messages"
    if isinstance(prompt, list | tuple):
        return "messages"
    if prompt is not None:
        return "text"
    return "hh" if isinstance(chosen, str) and ASSISTANT in chosen else "implicit_text"


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Rejected("WRONG_TYPE", f"`{name}` is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("INVALID_UTF8", f"`{name}` holds a lone surrogate at character {error.start}") from None
    return value


def _conversation(value: Any, name: str) -> Conversation:
    if not isinstance(value, list | tuple):
        raise Rejected("WRONG_TYPE", f"`{name}` is {type(value).__name__}, not a list of messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Rejected("BAD_MESSAGE", f"`{name}`, message {i}: no role")
        if message["role"] not in ROLES:
            raise Rejected("BAD_ROLE", f"`{name}`, message {i}: role {message['role']!r}"[:200])
        if not isinstance(message.get("content"), str):
            raise Rejected("BAD_MESSAGE", f"`{name}`, message {i}: no text content")
        messages.append({"role": message["role"], "content": _text(message["content"], name)})
    return tuple(messages)


def _answer(value: Any, name: str) -> str:
    """Take the assistant's text of a completion given as text or as a list of one message."""
    if isinstance(value, str):
        return _text(value, name)
    turns = _conversation(value, name)
    _require(bool(turns), f"EMPTY_{name.upper()}", f"`{name}` is an empty list")
    _require(turns[-1]["role"] == "assistant", "LAST_TURN_NOT_ASSISTANT", f"`{name}` ends with {turns[-1]['role']}")
    _require(len(turns) == 1, "PROMPT_MISMATCH", f"`{name}` holds {len(turns)} turns beside an explicit prompt")
    return turns[0]["content"]


def _message_group(prompt: Conversation, chosen: Any, rejected: Any) -> TextGroup:
    both = [_conversation(v, n) for v, n in ((chosen, "chosen"), (rejected, "rejected")) if isinstance(v, list | tuple)]
    if (
        prompt and both and all(turns[: len(prompt)] == prompt for turns in both)
    ):  # the prompt is repeated at the beginning of both, as UltraFeedback has it
        return _implicit_messages(None, chosen, rejected)
    return TextGroup(prompt, (_answer(chosen, "chosen"), _answer(rejected, "rejected")), (1.0, 0.0))


def _implicit_messages(prompt: Any, chosen: Any, rejected: Any) -> TextGroup:
    both = _conversation(chosen, "chosen"), _conversation(rejected, "rejected")
    for turns, name in zip(both, ("chosen", "rejected"), strict=True):
        _require(bool(turns), f"EMPTY_{name.upper()}", f"`{name}` has no messages")
        _require(turns[-1]["role"] == "assistant", "LAST_TURN_NOT_ASSISTANT", f"`{name}` ends with {turns[-1]['role']}")
    shared = both[0][:-1]
    if isinstance(prompt, str) and len(both[0]) == len(both[1]) == 1:  # the completions alone, and a prompt of text
        shared = ({"role": "user", "content": _text(prompt, "prompt")},)
    else:
        _require(shared == both[1][:-1], "PROMPT_MISMATCH", "chosen and rejected differ before their last turn")
        _require(bool(shared), "MISSING_PROMPT", "chosen and rejected hold a single message each")
    return TextGroup(shared, (both[0][-1]["content"], both[1][-1]["content"]), (1.0, 0.0))


def _hh_group(chosen: str, rejected: str) -> TextGroup:
    """Split HH-RLHF dialogues at the last turn of the assistant; everything before is the prompt."""
    cuts = [text.rfind(ASSISTANT) for text in (chosen, rejected)]
    _require(min(cuts) >= 0, "LAST_TURN_NOT_ASSISTANT", "no turn of the assistant")
    for text, cut, name in ((chosen, cuts[0], "chosen"), (rejected, cuts[1], "rejected")):
        _require(HUMAN not in text[cut:], "LAST_TURN_NOT_ASSISTANT", f"`{name}` ends with a turn of the human")
    prompts = [text[: cut + len(ASSISTANT)] for text, cut in zip((chosen, rejected), cuts, strict=True)]
    _require(prompts[0] == prompts[1], "PROMPT_MISMATCH", "the dialogues differ before their last turn")
    answers = chosen[len(prompts[0]) :], rejected[len(prompts[0]) :]
    return TextGroup(prompts[0], answers, (1.0, 0.0), messages=_hh_messages(prompts[0]))


def _hh_messages(prompt: str) -> Conversation:
    """Split at the turns; what stands before the first is the system's."""
    before, *pieces = _TURN.split(prompt.removesuffix(ASSISTANT))
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, text in zip(pieces[::2], pieces[1::2], strict=True):
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": text.strip()})
    return tuple(turns)


def _implicit_text(chosen: str, rejected: str) -> TextGroup:
    """Take the longest common beginning as the prompt, cut back to the last white space so that no word is split."""
    shared = os.path.commonprefix([chosen, rejected])
    if len(shared) < max(len(chosen), len(rejected)):
        shared = shared[: max(shared.rfind(c) for c in " \n\t") + 1].rstrip()
    _require(bool(shared.strip()) or chosen == rejected, "PROMPT_MISMATCH", "chosen and rejected share no beginning")
    messages = ({"role": "user", "content": shared},)
    return TextGroup(shared, (chosen[len(shared) :], rejected[len(shared) :]), (1.0, 0.0), messages)


def _checked(group: TextGroup) -> TextGroup:
    spoken = group.prompt if isinstance(group.prompt, str) else "".join(m["content"] for m in group.prompt)
    spoken = "".join(m["content"] for m in group.messages) if group.messages is not None else spoken
    if group.completions[0] == group.completions[1]:
        raise Rejected("IDENTICAL_PAIR")
    for completion, reason in zip(group.completions, ("EMPTY_CHOSEN", "EMPTY_REJECTED"), strict=True):
        _require(bool(completion.strip()), reason, "no text but white space")
    _require(bool(spoken.strip()), "EMPTY_PROMPT", "no text but white space")
    return group
