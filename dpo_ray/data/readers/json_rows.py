"""Reads rows of JSON Lines and JSON lists. Each row is parsed separately, so that a damaged row does not affect the others."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from dpo_ray.data.admission import Rejected

MAX_ROW_BYTES = 16 << 20

_PRETTY = re.compile(rb'\{[ \t\r]*\n\s*"')  # in JSON Lines, a row is on the same line as its opening brace
_LINE_ENDS = re.compile(rb"\n+")
_IN_ELEMENT = re.compile(rb'[^"\[\]{}]*+')
_BETWEEN_ELEMENTS = re.compile(rb'[^",\[\]{}]*+')
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_CLOSER = {ord("["): ord("]"), ord("{"): ord("}")}


def json_rows(chunks: Iterable[bytes]) -> Iterator[tuple[Any, int]]:
    """Yield (value or Rejected, size in bytes) for each line, or for each element if the text is a list `[...]`.

    Raises:
        Rejected: SHARD_PRETTY if an object spans several lines; SHARD_TRUNCATED if the list is not closed; SHARD_DAMAGED
            if the brackets of the list do not match.
    """
    chunks, head = iter(chunks), b""
    for chunk in chunks:
        head = without_bom(head + chunk).lstrip()
        if len(head) >= 64:
            break
    if _PRETTY.match(head):
        raise Rejected("SHARD_PRETTY", f"the file begins with {head[:60]!r}")
    rest = chain([head], chunks)
    for item, size in _list_items(rest) if head.startswith(b"[") else _filled(lines(rest)):
        yield (item if isinstance(item, Rejected) else _parsed(item)), size


def begins_list(head: bytes) -> bool:
    """Return whether a text that begins with `head` is a JSON list and not JSON Lines."""
    return without_bom(head).lstrip().startswith(b"[")


def without_bom(text: bytes) -> bytes:
    """Remove the byte order mark that some programs write before UTF-8."""
    return text.removeprefix(codecs.BOM_UTF8)


def lines(chunks: Iterable[bytes], *, keep_empty: bool = False) -> Iterator[tuple[bytes | Rejected, int]]:
    """Split chunks of bytes into lines without their `\\n`. Empty lines are left out, unless `keep_empty` is set.

    Memory and time are limited, since a compressed file of megabytes may contain gigabytes of one line or of empty lines:
    only one chunk and one line of at most MAX_ROW_BYTES are held, and each byte is read a fixed number of times.
    """
    parts: list[bytes] = []  # the beginning of a line whose end is in a later chunk
    held_bytes, skipping = 0, False  # skipping: the rest of a line that was already reported as too long
    for chunk in chunks:
        if skipping:
            end = chunk.find(b"\n")
            if end < 0:
                continue
            chunk, skipping = chunk[end + 1 :], False
        first, *others = chunk.split(b"\n") if keep_empty else _LINE_ENDS.split(chunk)
        parts.append(first)
        held_bytes += len(first)
        for following in others:
            line = b"".join(parts)
            if line or keep_empty:
                yield (_too_long(line), 0) if held_bytes > MAX_ROW_BYTES else (line, held_bytes)
            parts, held_bytes = [following], len(following)
        if held_bytes > MAX_ROW_BYTES:
            yield _too_long(b"".join(parts)), 0
            parts, held_bytes, skipping = [], 0, True
    if line := b"".join(parts):
        yield line, held_bytes


def _filled(items: Iterable[tuple[bytes | Rejected, int]]) -> Iterator[tuple[bytes | Rejected, int]]:
    return ((item, size) for item, size in items if isinstance(item, Rejected) or (item and not item.isspace()))


def _list_items(chunks: Iterator[bytes]) -> Iterator[tuple[bytes | Rejected, int]]:
    """Split the text of a JSON list into the texts of its elements. Text after the list is split into lines.

    Only strings and brackets are parsed here, to find the end of each element. The current element begins at `start`,
    and is parsed up to `position`.
    """
    text, start, position = next(chunks), 1, 1
    closers: list[int] = []  # the closing brackets that must follow before the element ends
    in_string = skipping = False
    while True:
        if in_string:
            closed, position = _string_end(text, position)
            in_string = not closed
        if not in_string:
            skipped = (_IN_ELEMENT if closers else _BETWEEN_ELEMENTS).match(text, position)
            position = skipped.end() if skipped else position
        if in_string or position == len(text):
            if position - start > MAX_ROW_BYTES:
                if not skipping:
                    yield _too_long(text[start:]), 0
                skipping, start = True, position
            more = next(chunks, b"")
            if not more:
                raise Rejected("SHARD_TRUNCATED", "the list is not closed")
            text, position, start = text[start:] + more, position - start, 0
            continue
        symbol, position = text[position], position + 1
        if symbol == _QUOTE:
            in_string = True
        elif symbol in _CLOSER:
            closers.append(_CLOSER[symbol])
        elif closers or symbol == ord("}"):
            if not closers or symbol != closers.pop():
                raise Rejected(
                    "SHARD_DAMAGED", f"brackets do not match: {text[max(start, position - 99) : position]!r}"
                )
        else:  # a comma, or the list's end
            item, start = text[start : position - 1], position
            if not skipping and item and not item.isspace():
                yield (_too_long(item), 0) if len(item) > MAX_ROW_BYTES else (item, len(item))
            skipping = False
            if symbol == ord("]"):
                yield from _filled(lines(chain([text[position:]], chunks)))
                return


def _string_end(text: bytes, position: int) -> tuple[bool, int]:
    """Find the quote that closes a string. Return whether the text contains it, and the position where parsing continues."""
    begin = position
    while (at := text.find(b'"', position)) >= 0:
        before = at
        while before > begin and text[before - 1] == _BACKSLASH:
            before -= 1
        position = at + 1
        if (at - before) % 2 == 0:
            return True, position
        begin = position
    return False, max(begin, len(text.rstrip(b"\\")))  # whether the backslashes escape the next byte is not known yet


def _too_long(line: bytes) -> Rejected:
    return Rejected("TOO_LONG_BYTES", f"the row has over {MAX_ROW_BYTES} bytes: {line[:100]!r}")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(without_bom(line).decode())  # from bytes, `loads` would also read UTF-16 and UTF-32
    except UnicodeDecodeError as error:
        return Rejected("INVALID_UTF8", f"byte {error.start} is not UTF-8: {line[:100]!r}")
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
        return Rejected("JSON_SYNTAX", f"{error}: {line[:100]!r}"[:300])
