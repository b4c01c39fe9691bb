"""Finds the token that ends the turn of an answer. It is the last token of a completion, and sampling stops at it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

_ID_BYTES = np.dtype(np.int32).itemsize


class TurnEnding:
    """The tokens that can end a turn: with a chat template every special token, and with plain text only EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> None:
        self._tokenizer = tokenizer
        marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self.eos_id = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        ends = (self.eos_id,) if plain else (self.eos_id, *tokenizer.all_special_ids, *marked)
        self.own_id: int | None = None  # the token that the template writes after an answer; None if it is not known
        self.tokens = frozenset(map(_as_bytes, ends))
        self._blank: dict[bytes, bool] = {}

    def after(self, answer: bytes) -> TurnEnding:
        """Set `own_id`, the token that the template writes after answers. It is found at the end of `answer` (int32 ids).

        The text of the answer must not contain a special token.
        """
        self.own_id = int(np.frombuffer(self.ended(answer)[-_ID_BYTES:], np.int32)[0])
        return self

    def ended(self, ids: bytes) -> bytes:
        """Return a completion (int32) up to its end-of-turn token; tokens that the template writes after it are removed.

        The candidates are the end tokens at the end of the completion that are followed only by end tokens and white
        space, as in `answer<|im_end|>\\n` or `answer<|end|>\\n<|endoftext|>`. The end-of-turn token is the first
        candidate that the template writes itself (`own_id`), because the answer may also end with a special token
        (`</think><|im_end|>`). If the template writes none of the candidates, the first candidate is the end-of-turn
        token. If there is no candidate, EOS is appended.
        """
        own = b"" if self.own_id is None else _as_bytes(self.own_id)
        first = end = None
        for behind in range(len(ids), 0, -_ID_BYTES):
            token = ids[behind - _ID_BYTES : behind]
            if token in self.tokens:
                first = behind
                end = behind if token == own else end
            elif not self._is_blank(token):
                break
        end = first if end is None else end
        return ids + _as_bytes(self.eos_id) if end is None else ids[:end]

    def _is_blank(self, token: bytes) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode(np.frombuffer(token, np.int32).tolist())).strip()
        return self._blank[token]


def generation_ends(model_directory: Path) -> set[int]:
    """Return the ids that generation_config.json of a model lists as `eos_token_id`; an empty set if there are none."""
    try:
        found = json.loads((model_directory / "generation_config.json").read_bytes())["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {i for i in (found if isinstance(found, list) else [found]) if type(i) is int and i >= 0}


def _as_bytes(token: int) -> bytes:
    return np.int32(token).tobytes()
