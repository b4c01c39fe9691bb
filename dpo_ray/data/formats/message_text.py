"""Converts messages to lists of objects if they are stored as JSON text, as text of a Python list, or as one list per field."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from dpo_ray.data.admission import Rejected

_BEGIN = re.compile(r"\s*(?:array\(\s*)?(?:\[\s*)?\{\s*(['\"])(role|from|content|value)\1\s*:")
_KEYS = (
    (re.compile(r"(['\"])role\1\s*:"), re.compile(r"(['\"])content\1\s*:")),
    (re.compile(r"(['\"])from\1\s*:"), re.compile(r"(['\"])value\1\s*:")),
)


def decoded(row: Mapping[str, Any], names: frozenset[str]) -> Mapping[str, Any]:
    """Return the row with all messages in the named columns converted to lists of objects; other values do not change.

    Raises:
        Rejected: BAD_MESSAGE, if a text begins like a list of messages and is neither JSON nor a Python list.
    """
    changed = {}
    for name in names & row.keys():
        value = row[name]
        if isinstance(value, Mapping) and (turned := _turned(value)) is not None:
            changed[name] = turned
        elif isinstance(value, str) and _looks_like_messages(value):
            changed[name] = _messages(value, name)
        elif isinstance(value, list | tuple) and any(isinstance(v, str) and _looks_like_messages(v) for v in value):
            items = [_messages(v, name) if isinstance(v, str) and _looks_like_messages(v) else v for v in value]
            changed[name] = [m[0] if isinstance(m, list) and len(m) == 1 else m for m in items]
    return {**row, **changed} if changed else row


def _turned(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Convert messages that are stored as one list per field to a list of messages; return None for any other value.

    `datasets` stores a Sequence of objects as one list per field: {"role": [...], "content": [...]}.
    """
    lists = {k: v for k, v in value.items() if isinstance(v, list | tuple)}
    if (
        not (_has(lists, "role", "content") or _has(lists, "from", "value"))
        or len({len(v) for v in lists.values()}) != 1
    ):
        return None
    return [
        {k: v for k, v in zip(lists, fields, strict=True) if v is not None}
        for fields in zip(*lists.values(), strict=True)
    ]


def _looks_like_messages(text: str) -> bool:
    return _BEGIN.match(text) is not None and any(all(key.search(text) for key in pair) for pair in _KEYS)


def _messages(text: str, name: str) -> Any:
    value = _literal(text)
    items = value if isinstance(value, list) else [value]
    if not items or not all(
        isinstance(m, Mapping) and (_has(m, "role", "content") or _has(m, "from", "value")) for m in items
    ):
        raise Rejected(
            "BAD_MESSAGE",
            f"`{name}` is text that begins like a list of messages, but is neither JSON nor a Python list",
        )
    return items


def _has(message: Mapping[str, Any], *keys: str) -> bool:
    return message.keys() >= {keys[0]} and (keys[1] in message or "tool_calls" in message)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
