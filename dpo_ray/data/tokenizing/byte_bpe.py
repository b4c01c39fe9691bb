"""Encodes text with byte-level BPE faster than the tokenizer: splits text into words, and encodes each different word once.

Byte-level BPE never merges across the words into which the pre-tokenizer's regular expression splits a text. Most words of
a corpus have been seen before, so it is several times faster to split text with Python's `re` and look up the words than
to encode the text again. The ids must be exactly those of the tokenizer. Therefore:
- `Words.of` returns None if the tokenizer has a property that is not supported here.
- A text is left to the tokenizer if it contains a character whose class could differ between versions of Unicode.
- Before the first use, random texts are split here and by the tokenizer, and the words are compared.
"""

from __future__ import annotations

import array
import functools
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from .special_tokens import Spelled

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's expression if use_regex is set
MAX_PIECES = 2**17  # in the cache at once; some 20 MiB
_LONG_CHARACTERS = 64  # a piece of this length rarely occurs again, and is not cached
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \\s in the tokenizers' sense
_ODD_SPACES = ("   ", " \n", "\n ", *"\t\r\v\f\x1c\x1d\x1e\x1f")
_ALL_ODD_SPACES = (
    *_ODD_SPACES,
    *"\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000",
    *map(chr, range(0x2000, 0x200B)),
)
"""Where one or two plain spaces stand between other text, a word begins at each of these spaces. Near the spaces listed
here, a word may begin elsewhere."""

_CLASS = re.compile(r"\\p\{([LNM][a-z]?)\}|\\s|\\S")
_PROBES, _PROBE_CHARACTERS = 96, 160


class _Cache(dict[str, bytes]):
    """A cache of the ids (int32) of pieces of text. A piece is encoded at its first lookup.

    When the cache is full, all entries except those of `fixed` are removed.
    """

    def __init__(self, encode: Callable[[str], bytes], fixed: Mapping[str, bytes] | None = None) -> None:
        super().__init__(fixed or {})
        self._encode, self._fixed = encode, dict(self)

    def __missing__(self, piece: str) -> bytes:
        ids = self._encode(piece)
        if len(piece) < _LONG_CHARACTERS:
            if len(self) >= MAX_PIECES:
                self.clear()
                self.update(self._fixed)
            self[piece] = ids
        return ids


class Words:
    """Encodes text word by word, with the ids of one byte-level BPE tokenizer.

    Text between two single spaces is looked up in a cache before it is split into words.
    """

    def __init__(self, backend: Tokenizer, pattern: str) -> None:
        added = backend.get_added_tokens_decoder()
        added_ids = {token.content: np.int32(i).tobytes() for i, token in added.items()}
        self._added = Spelled(added_ids)
        self.longest_added = max(map(len, added_ids), default=0)
        self._ascii = re.compile(_in_classes(pattern, ascii_only=True)).findall
        self._wide = re.compile(_in_classes(pattern, ascii_only=False)).findall
        self._is_stable = _stable()
        self._is_nfc = backend.normalizer is not None
        model, letters = backend.model, _letters_of_bytes()

        def encode(word: str) -> bytes:
            of_bytes = word.encode().decode("latin-1").translate(letters)
            return array.array("i", [token.id for token in model.tokenize(of_bytes)]).tobytes()

        self._words = _Cache(encode)
        self._spaced = _Cache(lambda follow: self._cut_ids(f" {follow}"))
        self._starts = _Cache(self._cut_ids, fixed=added_ids)  # for text up to the first space, and for added tokens

    @classmethod
    def of(cls, backend: Tokenizer) -> Words | None:
        """Return the word encoder of a tokenizer, or None if this kind of tokenizer is not supported."""
        pattern = _pattern(backend)
        if pattern is None or not _is_understood(backend):
            return None
        try:
            words = cls(backend, pattern)
        except re.error:  # the tokenizer's expression uses syntax that `re` does not have
            return None
        return words if words._agrees_with(backend.pre_tokenizer) else None

    def encode(self, text: str) -> bytes | None:
        """Encode a text to token ids, and return the ids as int32 bytes. The text may contain added tokens.

        Return None if only the original tokenizer can encode the text.
        """
        encoded: list[bytes] = []
        odd_spaces: list[str] | None = None  # the odd spaces in the text; None until they are searched for
        for part in self._added.split(text):  # text, token, text, ..., text
            known = self._starts.get(part)
            if known is not None:
                encoded.append(known)
                continue
            if odd_spaces is None:
                if not self._is_understood(text):
                    return None
                odd_spaces = [odd for odd in (_ODD_SPACES if text.isascii() else _ALL_ODD_SPACES) if odd in text]
            if part.endswith("  ") or (odd_spaces and any(map(part.__contains__, odd_spaces))):
                encoded.append(self._cut_ids(part))
            else:
                start, *follow = part.split(" ")
                encoded.append(self._starts[start])
                encoded += map(self._spaced.__getitem__, follow)
        return b"".join(encoded)

    def _is_understood(self, text: str) -> bool:
        """Return whether a text can be encoded here.

        This is so if the tokenizer's normalizer does not change the text, and if the classes of its characters are the
        same in every version of Unicode.
        """
        if text.isascii():
            return True
        return bool(self._is_stable(text)) and not (self._is_nfc and not unicodedata.is_normalized("NFC", text))

    def settled(self, text: str) -> int:
        """Return the last position where a text can be cut without changing its ids, whatever text is appended to it.

        The position is after all added tokens and before a word. Return 0 if there is no such position.
        """
        place = len(text) - max(self.longest_added, 1)  # an added token that begins before this place ends in the text
        last_added = self._added.last(text)
        first = 0 if last_added is None else last_added.end()
        while (place := text.rfind(" ", first + 1, max(place, 0))) > 0:
            if text[place - 1].isalnum() and text[place + 1].isalnum():
                return place
        return 0

    def _cut_ids(self, text: str) -> bytes:
        return b"".join(map(self._words.__getitem__, self._cut(text)))

    def _cut(self, text: str) -> list[str]:
        """Split text into words as the tokenizer does."""
        return (self._ascii if text.isascii() else self._wide)(text)

    def _agrees_with(self, pre_tokenizer: Any) -> bool:
        """Return whether random texts are split into the same words here and by the tokenizer.

        The words must also be the same if a text is first cut at spaces, or at the position that `settled` returns.
        """
        chance = random.Random(0)
        for _ in range(_PROBES):
            text = _random_text(chance)
            theirs = [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]
            if self._cut(text) != theirs:
                return False
            regular = re.sub(r"\s+", lambda run: run[0] if " " not in run[0] or run[0] == "  " else " ", text).rstrip()
            start, *follow = regular.split(" ")
            by_spaces = [word for part in (start, *(f" {f}" for f in follow)) for word in self._cut(part)]
            if by_spaces != self._cut(regular):
                return False
            place = self.settled(text[: chance.randrange(len(text))])
            if self._cut(text[:place]) + self._cut(text[place:]) != theirs:
                return False
        return True


def _letters_of_bytes() -> dict[int, str]:
    """Map each byte to the character that represents it in byte-level vocabularies.

    A printable byte is represented by its own character, and every other byte by a character from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _pattern(backend: Tokenizer) -> str | None:
    """Return the regular expression by which the tokenizer splits text into words.

    Return None if the tokenizer also uses other rules, or if `_is_local` does not hold for the expression.
    """
    if backend.pre_tokenizer is None:
        return None
    state = json.loads(backend.pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        pattern = GPT2 if steps[0]["use_regex"] else None
    elif [step["type"] for step in steps] == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        by_regex = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        pattern = steps[0]["pattern"].get("Regex") if by_regex else None
    else:
        pattern = None
    if pattern is None or steps[-1]["add_prefix_space"] or not _is_local(pattern):
        return None
    return pattern


def _is_local(pattern: str) -> bool:
    """Return whether the end of a word depends only on the word and the next character, and `re` can use the pattern.

    The pattern must have the same meaning in Python's `re` as in the tokenizer.
    """
    rest = pattern.replace(r"(?!\S)", "").replace("(?i:", "").replace("(?:", "")
    rest = _CLASS.sub("", rest).replace(r"\r", "").replace(r"\n", "")
    return "(?" not in rest and "\\" not in rest and "&&" not in rest and "[:" not in rest


def _is_understood(backend: Tokenizer) -> bool:
    normalizer = backend.normalizer and json.loads(backend.normalizer.__getstate__())["type"]
    added = list(backend.get_added_tokens_decoder().values())
    return (
        isinstance(backend.model, models.BPE)
        and not backend.model.dropout
        and normalizer in (None, "NFC")
        and not backend.encode_special_tokens
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and len({token.normalized for token in added}) <= 1  # if there are both kinds, one is matched before the other
    )


def _in_classes(pattern: str, *, ascii_only: bool) -> str:
    """Replace the Unicode classes in a pattern by their characters, since `re` lacks them or defines them differently."""

    def written(match: re.Match[str]) -> str:
        name = match[0]
        ranges = _ranges("s" if name in (r"\s", r"\S") else match[1], ascii_only)
        before, after = pattern[: match.start()], pattern[match.start() :]
        in_brackets = len(re.findall(r"\[", before)) > len(re.findall(r"\]", before)) and "]" in after
        if name == r"\S":
            return f"[^{ranges}]"
        return ranges if in_brackets else f"[{ranges}]"

    return _CLASS.sub(written, pattern)


@functools.cache
def _ranges(name: str, ascii_only: bool) -> str:
    """Return the characters of a class, for a regular expression.

    `name` is `s` (white space, as tokenizers define it), a Unicode category such as Lu, or a category's first letter.
    """
    if name == "s":
        return r"\t-\r " if ascii_only else _SPACE
    limit = 128 if ascii_only else 65536
    none = "\ud800"  # occurs in no text
    return _as_ranges(c for c in range(limit) if unicodedata.category(chr(c)).startswith(name)) or none


@functools.cache
def _stable() -> Callable[[str], object]:
    """Return a function that matches a text if every version of Unicode splits it into the same words.

    It accepts characters that have been letters, digits, marks, spaces or symbols since Unicode 3.2. It also accepts newer
    symbols such as emoji: an old version does not know them, but it does not count them as letters, digits, marks or
    spaces either.
    """
    old, codes = unicodedata.ucd_3_2_0, []
    for code in (*range(65536), *range(0x1F300, 0x1FB00)):
        now, then = unicodedata.category(chr(code)), old.category(chr(code))
        if (now == then and now not in ("Cn", "Co", "Cs")) or (now in ("So", "Sk") and then == "Cn"):
            codes.append(code)
    return re.compile(f"[{_as_ranges(codes)}]*").fullmatch


def _as_ranges(codes: Iterable[int]) -> str:
    """Convert ascending code points to the ranges of a regular expression, such as `A-Za-z`."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges)


_ALPHABETS = (
    "abzS'tdrevmlL",
    "AZQ",
    "0123456789",
    " ",
    "  \t",
    "\n\r",
    "\x0b\x0c\x00\x1f\x7f\x85\xa0\u2003\u3000",
    "".join(map(chr, range(33, 48))),
    "@[]\\^_`{|}~",
    "éßñÆſK",
    "中文かなقअ",
    "²½٣Ⅷ",
    "’“—…€",
    "\u0301\u0903\u200d\ufe0f",
    "😀🚀🏻",
)


def _random_text(chance: random.Random) -> str:
    """Build a random text from short and long runs of all kinds of characters that matter for splitting words."""
    text = ""
    while len(text) < _PROBE_CHARACTERS:
        alphabet = chance.choice(_ALPHABETS)
        text += "".join(chance.choices(alphabet, k=chance.choice((1, 1, 1, 2, 3, 4, 7, 12))))
    return text
