"""Encodes rendered conversations. The ids are those of the whole text, although the prompt is encoded only once per group.

For this, the prompt is cut at a position where a cut does not change the ids; only the text after the cut is encoded for
each completion. Such positions are the starts of words of a byte-level BPE tokenizer (`byte_bpe`), and the starts of added
tokens, at which every tokenizer splits a text first. If there is no such position, whole conversations are encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_ray.data.admission import Rejected

from .byte_bpe import Words
from .chat import Rendered
from .special_tokens import Spelled

_CHECKED_PER_BATCH = 2  # groups encoded by `Words` whose ids are compared with the tokenizer's own

_log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Token ids of a prompt and its completions, as bytes of int32."""

    prompt: bytes
    completions: list[bytes]


class Encoder:
    """Encodes batches of rendered groups with one tokenizer. The tokenizer must not be changed while the encoder is used."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = []
        if self._backend is not None:
            tokenizer("a")  # makes the backend neither truncate nor pad
            if not self._backend.encode_special_tokens:
                added = list(self._backend.get_added_tokens_decoder().values())
        self._words = None if self._backend is None else Words.of(self._backend)
        normalizes = self._backend is not None and self._backend.normalizer is not None
        clean = clean_starts(token.content for token in added)
        cuts = [t.content for t in added if not (t.lstrip or t.single_word or (normalizes and t.normalized))]
        self._cuts = Spelled(content for content in cuts if content in clean)
        # A template writes its own special tokens; plain text gets the tokenizer's own, such as BOS, at its start.
        self._before = _ids_before(tokenizer) if plain else b""

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded | Rejected]:
        """Encode a batch. A group becomes `Rejected` if the tokens of a conversation do not begin with those of its prompt."""
        words = self._words
        by_words = [None if words is None else self._by_words(words, r) for r in rendered]
        mine = [i for i, group in enumerate(by_words) if group is not None]
        checked = self._by_tokenizer([rendered[i] for i in mine[:_CHECKED_PER_BATCH]], may_cut=False)
        if any(_differ(by_words[i], group) for i, group in zip(mine, checked, strict=False)):
            _log.warning(
                "the tokenizer splits words differently than expected; it now encodes all text itself, which takes longer"
            )
            self._words, by_words = None, [None] * len(rendered)
        missing = [i for i, group in enumerate(by_words) if group is None]
        others = iter(self._by_tokenizer([rendered[i] for i in missing], may_cut=True))
        return [next(others) if group is None else group for group in by_words]

    def _by_words(self, words: Words, rendered: Rendered) -> Encoded | Rejected | None:
        """Encode a group with `words` instead of the tokenizer. Return None if `words` cannot encode the texts."""
        cut = words.settled(rendered.prompt) or self._last_cut(rendered.prompt)
        head, tail = words.encode(rendered.prompt[:cut]), words.encode(rendered.prompt[cut:])
        if head is None or tail is None:
            return None
        completions = []
        for whole in rendered.wholes:
            ids = words.encode(whole[cut:])
            if ids is None:
                return None
            if not ids.startswith(tail):
                return _broken()
            completions.append(ids[len(tail) :])
        return Encoded(self._before + head + tail, completions)

    def _last_cut(self, prompt: str) -> int:
        """Return the start of the last added token at which the prompt can be cut; 0 if there is no such token."""
        last = self._cuts.last(prompt)
        return 0 if last is None else last.start()

    def _by_tokenizer(self, rendered: Sequence[Rendered], *, may_cut: bool) -> list[Encoded | Rejected]:
        cuts = [self._last_cut(r.prompt) if may_cut else 0 for r in rendered]
        places: dict[str, int] = {}  # equal texts, such as those after the last added token of a prompt, occur once
        for r, cut in zip(rendered, cuts, strict=True):
            for text in (r.prompt, r.prompt[cut:], *(whole[cut:] for whole in r.wholes)):
                places.setdefault(text, len(places))
        ids = self._ids(list(places))
        return [self._joined(r, cut, places, ids) for r, cut in zip(rendered, cuts, strict=True)]

    def _joined(self, rendered: Rendered, cut: int, places: dict[str, int], ids: list[bytes]) -> Encoded | Rejected:
        prompt, tail = ids[places[rendered.prompt]], ids[places[rendered.prompt[cut:]]]
        wholes = [ids[places[whole[cut:]]] for whole in rendered.wholes]
        if not prompt.endswith(tail):  # should not happen: encode the whole conversations then
            wholes, tail = self._ids(rendered.wholes), prompt
        if not all(whole.startswith(tail) for whole in wholes):
            return _broken()
        return Encoded(self._before + prompt, [whole[len(tail) :] for whole in wholes])

    def _ids(self, texts: list[str]) -> list[bytes]:
        if not texts:
            return []
        if self._backend is None:
            ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        else:
            ids = [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [np.array(i, np.int32).tobytes() for i in ids]  # type: ignore[union-attr]


def _broken() -> Rejected:
    return Rejected("PREFIX_BROKEN", "prompt and completion merge into one token where they meet")


def _differ(first: Encoded | Rejected | None, second: Encoded | Rejected) -> bool:
    if isinstance(first, Encoded) and isinstance(second, Encoded):
        return first != second
    return type(first) is not type(second)


def _ids_before(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return the ids of the special tokens that the tokenizer puts before a text, such as BOS, as the bytes of int32.

    Special tokens that the tokenizer puts after a text are not used: they would separate the prompt from the answer.
    """
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    dressed: list[int] = tokenizer("a")["input_ids"]  # type: ignore[assignment]
    starts = (i for i in range(len(dressed)) if bare and dressed[i : i + len(bare)] == bare)
    return np.array(dressed[: next(starts, 0)], np.int32).tobytes()


def clean_starts(tokens: Iterable[str]) -> frozenset[str]:
    """Return the added tokens that, in any text, never overlap with an added token that begins before them."""
    tokens = frozenset(tokens)
    within = {token[i:j] for token in tokens for i in range(1, len(token)) for j in range(i + 1, len(token) + 1)}
    ends = {token[i:] for token in tokens for i in range(1, len(token))}
    return frozenset(t for t in tokens if t not in within and not any(t[:j] in ends for j in range(1, len(t) + 1)))
