"""Checks that chat templates and tokenizers can use a text or a nested value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.data.admission import Rejected

DEEPEST = 64


def require(condition: bool, reason: str, detail: str) -> None:
    """Reject the row unless the condition holds."""
    if not condition:
        raise Rejected(reason, detail)


def sound_text(value: Any, name: str) -> str:
    """Return the value if it is text that a tokenizer can read.

    Raises:
        Rejected: WRONG_TYPE, or INVALID_UTF8 (a lone surrogate).
    """
    if not isinstance(value, str):
        raise Rejected("WRONG_TYPE", f"`{name}` is {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Rejected("INVALID_UTF8", f"`{name}` contains a lone surrogate at character {error.start}") from None
    return value


def sound_value(value: Any, name: str, reason: str, depth: int = 0) -> Any:
    """Copy a nested value of a message or a tool, and check all text in it.

    Raises:
        Rejected: WRONG_TYPE, if a key is not text; INVALID_UTF8, if a text contains a lone surrogate; `reason`, if the
            value is nested too deeply.
    """
    require(depth < DEEPEST, reason, f"`{name}` is nested deeper than {DEEPEST} levels")
    if isinstance(value, str):
        return sound_text(value, name)
    if isinstance(value, Mapping):
        return {sound_text(k, name): sound_value(v, name, reason, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [sound_value(item, name, reason, depth + 1) for item in value]
    return value
