"""Rejects rows with control characters (C0 except tab and line ends, and DEL), or removes or keeps the characters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo_ray.config.data import ControlCharacters
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup

_CONTROL = bytes(c for c in (*range(32), 127) if chr(c) not in "\t\n\r")
_REMOVED: dict[int, str | None] = dict.fromkeys(_CONTROL) | {
    0x0B: "\n",
    0x0C: "\n",
}  # vertical tab, form feed: a line end
# ECMA-48: control sequences (colours, cursor), control strings (titles, links) up to their end, and other escapes.
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


def with_controls(group: TextGroup, rule: ControlCharacters) -> TextGroup:
    """Apply the rule to all text of a group.

    Raises:
        Rejected: CONTROL_CHARS, if the rule is `quarantine` and the text contains a control character.
    """
    if rule == "keep":
        return group
    prompt = controlled(group.prompt, rule, "the prompt")
    completions = controlled(group.completions, rule, "a completion")
    messages = controlled(group.messages, rule, "the prompt")
    return group if rule == "quarantine" else replace(group, prompt=prompt, completions=completions, messages=messages)


def controlled(value: Any, rule: ControlCharacters, name: str) -> Any:
    """Apply the rule to all text in a nested value. Errors call the value `name`.

    Raises:
        Rejected: CONTROL_CHARS, if the rule is `quarantine` and the text contains a control character.
    """
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        if rule == "keep" or len(encoded.translate(None, _CONTROL)) == len(encoded):
            return value  # in UTF-8 these bytes encode nothing but these characters
        if rule == "clean":
            return _ESCAPE.sub("", value).translate(_REMOVED)
        control = next(byte for byte in encoded if byte in _CONTROL)
        raise Rejected("CONTROL_CHARS", f"{name} contains the control character U+{control:04X}")
    if isinstance(value, Mapping):
        return {controlled(k, rule, name): controlled(v, rule, name) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(controlled(item, rule, name) for item in value)
    return [controlled(item, rule, name) for item in value] if isinstance(value, list) else value
