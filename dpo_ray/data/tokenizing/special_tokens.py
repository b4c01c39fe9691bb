"""Finds out which tokens of a tokenizer are special, and which rows contain the text of a special token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_ray.data.groups import TextGroup


def control_tokens(tokenizer: PreTrainedTokenizerBase, user_turn: str) -> list[str]:
    """Return the tokens that the text of a row must not contain. With them a row could end a turn, or begin another one.

    These are the tokens that the tokenizer marks as special, or that it uses as BOS, EOS and so on. Other added tokens are
    included if the template writes them around a user's turn: some models have ChatML's tokens without marking them as
    special. Added tokens that do not stand around a turn (`<think>`, `<tool_call>`, several spaces) are content that
    answers may contain.
    """
    added = tokenizer.added_tokens_decoder.values()
    marked = [token.content for token in added if token.special]
    framing = [t.content for t in added if not t.special and t.content in user_turn and _looks_like_markup(t.content)]
    return sorted({*marked, *framing, *tokenizer.all_special_tokens} - {""})


def _looks_like_markup(token: str) -> bool:
    return bool(token.strip()) and not token[0].isalnum() and not token[0].isspace()


class InjectionScan:
    """Searches the text of rows for special tokens: text that the tokenizer would encode as one of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
        self._spelled = Spelled(tokens)
        # Some tokens are matched in normalised text, so any text that is normalised to the token's text counts.
        self._normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        added = tokenizer.added_tokens_decoder.values() if self._normalizer is not None else ()
        normalized = [t.content for t in added if t.normalized and t.content in tokens]
        self._spelled_normalized = Spelled(map(self._normalized, normalized)) if normalized else None

    def first(self, group: TextGroup) -> str | None:
        """Return the first special token that a row's text contains, or None."""
        text = _text(group)
        token = self._spelled.first(text)
        if token is None and self._spelled_normalized is not None:
            token = self._spelled_normalized.first(self._normalized(text))
        return token

    def _normalized(self, text: str) -> str:
        sound = text.encode("utf-8", "replace").decode()  # lone surrogates are rejected elsewhere
        return self._normalizer.normalize_str(sound) if self._normalizer is not None else text


class Spelled:
    """Searches a text, from left to right, for special tokens that are spelled as plain text, such as `<|im_end|>`.

    If several match at one position, the longest is taken.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._firsts = {token[0] for token in longest_first}

    def may_be_in(self, text: str) -> bool:
        """Return False if the text cannot contain any of the tokens. This is fast: only their first characters are searched."""
        return any(map(text.__contains__, self._firsts))

    def first(self, text: str) -> str | None:
        """Return the first token that the text contains, or None."""
        match = self._pattern.search(text) if self._pattern and self.may_be_in(text) else None
        return None if match is None else match[0]

    def last(self, text: str) -> re.Match[str] | None:
        """Return the match of the last token in the text, or None."""
        last = None
        if self._pattern and self.may_be_in(text):
            for match in self._pattern.finditer(text):
                last = match
        return last

    def split(self, text: str) -> list[str]:
        """Split a text into alternating parts: text, token, text, ..., text. All parts joined are the whole text."""
        return self._pattern.split(text) if self._pattern and self.may_be_in(text) else [text]


def _text(group: TextGroup) -> str:
    """Join all texts of a row, including the arguments of tool calls. The separator is a character that no token contains."""
    texts: list[str] = []
    turns = (group.prompt,) if isinstance(group.prompt, str) else group.prompt
    for turn in (*turns, *group.completions):
        if isinstance(turn, str):
            texts.append(turn)
        elif len(turn) == 2 and type(turn.get("content")) is str:  # only role and content, as in nearly all messages
            texts.append(turn["content"])
        else:  # the role is one of a few known values and need not be searched
            _collect([value for key, value in turn.items() if key != "role"], texts)
    if group.tools or group.template_kwargs:  # `messages` have the same text as `prompt`
        _collect((group.tools, group.template_kwargs), texts)
    return "\0".join(texts)


def _collect(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            texts.append(str(key))
            _collect(inner, texts)
    elif isinstance(value, list | tuple):
        for inner in value:
            _collect(inner, texts)
