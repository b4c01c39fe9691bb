"""Reads a data row as a preference group, according to the row's format, and checks the group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo_ray.config.data import ControlCharacters
from dpo_ray.config.sources import Columns, RowFormat
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message, TextGroup

from .catalog import FORMATS, fields_of, message_columns, named_columns
from .control import controlled, with_controls
from .fields import Fields
from .media import check_media
from .message_text import decoded
from .messages import check_alternation
from .recognise import check_context, recognise
from .soundness import require, sound_value

TEXT_FORMATS = ("text", "implicit_text", "hh")
"""Formats without messages. If the recipe names one of them, text that looks like messages is still read as plain text."""


def text_group(
    row: Mapping[str, Any],
    row_format: RowFormat,
    columns: Columns,
    criteria: Mapping[str, float],
    controls: ControlCharacters = "quarantine",
) -> TextGroup:
    """Read one row as a group. The completions keep the order of the row; `pairing` builds the pairs later.

    Args:
        row_format: the name of the format; `auto` recognises the format from the row's columns.
        columns: the column names that the recipe sets instead of the format's names.
        criteria: the weights by which several ratings of a completion become one score. Empty: its overall score is
            used.
        controls: whether control characters in the text reject the row, are removed, or stay.

    Raises:
        Rejected: with the reason that fits best; the row is then quarantined.
    """
    try:
        return _read(row, row_format, columns, criteria, controls)
    except RecursionError:
        raise Rejected("WRONG_TYPE", "the row is nested too deeply") from None


def _read(
    row: Mapping[str, Any],
    row_format: RowFormat,
    columns: Columns,
    criteria: Mapping[str, float],
    controls: ControlCharacters,
) -> TextGroup:
    check_media(row, named_columns(columns))  # pyright: ignore[reportArgumentType] - pydantic hashes frozen models
    if row_format not in TEXT_FORMATS:
        row = decoded(row, message_columns(columns))  # pyright: ignore[reportArgumentType] - as above
    is_named = row_format != "auto"
    row_format = row_format if is_named else recognise(row, columns)
    fields = fields_of(row, row_format, columns)
    if not is_named:
        check_context(fields, row_format)
    group = with_controls(FORMATS[row_format].read(fields, criteria), controls)
    _check(group)
    return _with_template_variables(group, fields, controls)


def _check(group: TextGroup) -> None:
    completions = group.completions
    if any(a == b for i, a in enumerate(completions) for b in completions[i + 1 :]):
        raise Rejected("IDENTICAL_PAIR")
    reasons = ("EMPTY_CHOSEN", "EMPTY_REJECTED") if group.chosen else ("EMPTY_COMPLETION",) * len(completions)
    for completion, reason in zip(completions, reasons, strict=True):
        require(_says_something(completion), reason, "there is no text except white space")
    turns = group.prompt if group.messages is None else group.messages
    spoken = _says_something(turns) if isinstance(turns, str) else any(map(_says_something, turns))
    require(spoken, "EMPTY_PROMPT", "there is no text except white space")
    if not isinstance(turns, str):
        check_alternation(turns)


def _says_something(turn: str | Message) -> bool:
    if isinstance(turn, str):
        return bool(turn.strip())
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def _with_template_variables(group: TextGroup, fields: Fields, controls: ControlCharacters) -> TextGroup:
    tools, variables = _decoded(fields, "tools"), _decoded(fields, "chat_template_kwargs")
    if not tools and not variables:
        return group
    listed = isinstance(tools or [], list | tuple) and all(isinstance(tool, Mapping) for tool in tools or [])
    require(listed, "BAD_TOOLS", "the tools are not a list of objects")
    require(isinstance(variables or {}, Mapping), "BAD_TOOLS", "the template's variables are not a mapping")
    sound = controlled(sound_value(list(tools or ()), "tools", "BAD_TOOLS"), controls, "`tools`")
    variables = sound_value(variables or {}, "chat_template_kwargs", "BAD_TOOLS")
    variables = controlled(variables, controls, "`chat_template_kwargs`")
    return replace(group, tools=tuple(map(_schema, sound)) or None, template_kwargs=variables)


def _decoded(fields: Fields, role: str) -> Any:
    """Return the list or mapping in the column of a role. JSON text is parsed, also if only the items of a list are JSON text."""
    value = fields.get(role)
    items = value if isinstance(value, list | tuple) else None
    try:
        if items is not None:
            return [json.loads(item) if isinstance(item, str) else item for item in items]
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError) as error:
        raise Rejected("BAD_TOOLS", f"`{fields.column(role)}` is not JSON: {error}"[:200]) from None


def _schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool as {type, function}, as chat templates expect it.

    In data for LLaMA-Factory, a tool is the function alone.
    """
    bare = "name" in tool and not {"type", "function"} & tool.keys()
    return {"type": "function", "function": tool} if bare else tool
