"""The tokenization of preference groups: text is rendered, encoded, checked and truncated."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup, TokenGroup

from .chat import PLAIN, RENDER_SECONDS, Rendered, Renderer
from .encode import Encoded, Encoder
from .special_tokens import InjectionScan, control_tokens
from .truncate import truncate
from .watchdog import Watchdog


def tokenize_groups(
    groups: Sequence[TextGroup | Rejected], tokenizer: PreTrainedTokenizerBase, template: str, config: DataConfig
) -> list[TokenGroup | Rejected]:
    """Tokenize a batch; an item that was or becomes rejected is returned at its position as `Rejected`.

    `template` is the chat template's text, or `plain`. The ids are those that the tokenizer produces for the rendered
    conversation, up to the token that ends the answer's turn. The tokenizer must not be changed between calls.
    """
    rendered = _rendered(groups, tokenizer, template, config)
    encoded = iter(_encoder(tokenizer, template == PLAIN).encode([r for r in rendered if not isinstance(r, Rejected)]))
    ending = _turn_ending(tokenizer, template == PLAIN)
    results: list[TokenGroup | Rejected] = []
    for group, text in zip(groups, rendered, strict=True):
        ids = text if isinstance(text, Rejected) else next(encoded)
        if isinstance(ids, Rejected):
            results.append(ids)
            continue
        assert isinstance(group, TextGroup)  # noqa: S101 - rejected groups stay rejected
        try:
            results.append(_token_group(group, ids, ending, config))
        except Rejected as rejected:
            results.append(rejected)
    return results


def _rendered(
    groups: Sequence[TextGroup | Rejected], tokenizer: PreTrainedTokenizerBase, template: str, config: DataConfig
) -> list[Rendered | Rejected]:
    renderer = Renderer(template, tokenizer, config)
    scan = _injection_scan(tokenizer, renderer.user_turn()) if config.rules.special_tokens == "quarantine" else None
    results: list[Rendered | Rejected] = []
    with Watchdog(RENDER_SECONDS) as watchdog:
        for group in groups:
            if isinstance(group, Rejected):
                results.append(group)
                continue
            token = None if scan is None else scan.first(group)
            if token is not None:
                results.append(Rejected("SPECIAL_TOKEN_INJECTION", f"the text holds {token}"))
                continue
            try:
                results.append(renderer.render(group, watchdog))
            except Rejected as rejected:
                results.append(rejected)
    return results


def _token_group(group: TextGroup, encoded: Encoded, ending: TurnEnding, config: DataConfig) -> TokenGroup:
    if not encoded.prompt:
        raise Rejected("EMPTY_PROMPT", "the prompt has no tokens")
    ended = [ending.ended(ids) for ids in encoded.completions]
    if any(ids in ending.tokens for ids in ended):
        raise Rejected("NO_RESPONSE_TOKENS", "rendered, a completion is nothing but the end of its turn")
    prompt, completions = truncate(
        np.frombuffer(encoded.prompt, np.int32), [np.frombuffer(ids, np.int32) for ids in ended], config
    )
    chosen, rejected = ([], []) if len(completions) == 1 else (list(group.chosen), list(group.rejected))
    pairs = zip(chosen, rejected, strict=True) if chosen else itertools.combinations(range(len(completions)), 2)
    if any(completions[a].tobytes() == completions[b].tobytes() for a, b in pairs):
        raise Rejected("NO_RESPONSE_TOKENS", "as tokens, after truncation, two completions are the same")
    return TokenGroup(
        prompt,
        completions,
        list(group.scores),
        chosen,
        rejected,
        group.preference_probability,
        hashlib.blake2b(encoded.prompt, digest_size=16).digest(),
    )


class TurnEnding:
    """The tokens that can end a turn: with a template any special token, in plain text only EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> None:
        self._tokenizer = tokenizer
        marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self._eos = _as_bytes(eos)
        self.tokens = frozenset(map(_as_bytes, (eos,) if plain else (eos, *tokenizer.all_special_ids, *marked)))
        self._blank: dict[bytes, bool] = {}

    def ended(self, ids: bytes) -> bytes:
        """Return a completion (int32) that ends with its end-of-turn token; what a template writes after it is removed.

        That is the first end token after which there are only end tokens and white space, as in
        `answer<|im_end|>\\n` or `answer<|end|>\\n<|endoftext|>`. If there is none, EOS is appended.
        """
        end = None
        for behind in range(len(ids), 0, -_ID_BYTES):
            token = ids[behind - _ID_BYTES : behind]
            if token in self.tokens:
                end = behind
            elif not self._is_blank(token):
                break
        return ids + self._eos if end is None else ids[:end]

    def _is_blank(self, token: bytes) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode(np.frombuffer(token, np.int32).tolist())).strip()
        return self._blank[token]


_ID_BYTES = np.dtype(np.int32).itemsize


def _as_bytes(token: int) -> bytes:
    return np.int32(token).tobytes()


# Building these takes longer than tokenizing a batch, so they are cached; a worker has one or two tokenizers.
_encoder = functools.lru_cache(maxsize=2)(lambda tokenizer, plain: Encoder(tokenizer, plain=plain))
_turn_ending = functools.lru_cache(maxsize=2)(lambda tokenizer, plain: TurnEnding(tokenizer, plain=plain))
_injection_scan = functools.lru_cache(maxsize=2)(
    lambda tokenizer, user_turn: InjectionScan(tokenizer, control_tokens(tokenizer, user_turn))
)
