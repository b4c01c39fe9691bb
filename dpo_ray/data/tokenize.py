"""From preference groups of text to token ids: rendered, tokenized, checked, truncated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from .admission import Rejected
from .chat import PLAIN, render
from .groups import TextGroup

Truncation = Literal["keep_start", "keep_end", "drop"]


@dataclass(frozen=True)
class TokenGroup:
    """One row of the tokens artifact."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    scores: list[float]
    preference_probability: float = 1.0
    weight: float = 1.0

    @property
    def group_id(self) -> bytes:
        """Hash the content (16 bytes), unambiguously: lengths stand before ids."""
        h = hashlib.blake2b(digest_size=16)
        for ids in (self.prompt_ids, *self.completion_ids):
            h.update(len(ids).to_bytes(4, "little"))
            h.update(np.asarray(ids, np.int32).tobytes())
        h.update(np.asarray([*self.scores, self.preference_probability, self.weight], np.float32).tobytes())
        return h.digest()


def tokenize_groups(
    groups: Sequence[TextGroup | Rejected],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length_tokens: int,
    truncation: Truncation,
) -> list[TokenGroup | Rejected]:
    """Tokenize a batch; an item that was or becomes rejected stands in its place as `Rejected`."""
    rendered = [_rendered(g, template, tokenizer) for g in groups]
    texts = [text for item in rendered if not isinstance(item, Rejected) for text in (item[0], *item[1])]
    ends = _end_tokens(tokenizer, template)
    encoded = iter(_encode(texts, tokenizer, plain=template == PLAIN))
    results: list[TokenGroup | Rejected] = []
    for group, item in zip(groups, rendered, strict=True):
        if isinstance(item, Rejected) or isinstance(group, Rejected):
            results.append(item if isinstance(item, Rejected) else group)  # type: ignore[arg-type]
            continue
        prompt, wholes = next(encoded), [next(encoded) for _ in item[1]]
        try:
            results.append(_token_group(group, prompt, wholes, tokenizer, ends, max_length_tokens, truncation))
        except Rejected as rejected:
            results.append(rejected)
    return results


def _rendered(
    group: TextGroup | Rejected, template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[str]] | Rejected:
    if isinstance(group, Rejected):
        return group
    try:
        return render(group, template, tokenizer)
    except Rejected as rejected:
        return rejected


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> list[list[int]]:
    """Tokenize in one call. A template writes its own special tokens; plain text gets the tokenizer's (a BOS)."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=plain, return_attention_mask=False)["input_ids"]
    if not plain:
        return ids  # type: ignore[return-value]
    # A tokenizer that closes text with an EOS of its own would put one between prompt and completion.
    end = tokenizer.eos_token_id
    closes = tokenizer("a")["input_ids"][-1:] == [end]  # type: ignore[index]
    return [i[:-1] if closes and i[-1:] == [end] else i for i in ids]  # type: ignore[index,return-value]


def _token_group(
    group: TextGroup,
    prompt: list[int],
    wholes: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
    max_length_tokens: int,
    truncation: Truncation,
) -> TokenGroup:
    if not prompt:
        raise Rejected("EMPTY_PROMPT", "the prompt has no tokens")
    if any(whole[: len(prompt)] != prompt for whole in wholes):
        raise Rejected("PREFIX_BROKEN", "prompt and completion merge into one token where they meet")
    completions = [_ended(whole[len(prompt) :], tokenizer, ends) for whole in wholes]
    prompt, completions = truncate(prompt, completions, max_length_tokens, truncation)
    if any(a == b for i, a in enumerate(completions) for b in completions[i + 1 :]):
        raise Rejected("NO_RESPONSE_TOKENS", "as tokens, after truncation, the completions are the same")
    return TokenGroup(prompt, completions, list(group.scores))


def _end_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> frozenset[int]:
    """Name the tokens that can end a turn: any special one that a template writes, EOS alone in plain text."""
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    if template == PLAIN:
        return frozenset((eos,))
    marked = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((eos, *tokenizer.all_special_ids, *marked))


def _ended(completion: list[int], tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> list[int]:
    """Let a completion end with its end-of-turn token: what a template writes after it is no part.

    That is the first end token after which there are only end tokens and white space, as in
    `answer<|im_end|>\\n` or `answer<|end|>\\n<|endoftext|>`. Where there is none, EOS is added.
    """
    end = None
    for i in range(len(completion) - 1, -1, -1):
        if completion[i] in ends:
            end = i
        elif str(tokenizer.decode(completion[i : i + 1])).strip():
            break
    return completion[: end + 1] if end is not None else [*completion, int(tokenizer.eos_token_id)]  # type: ignore[arg-type]


def truncate(
    prompt: list[int], completions: list[list[int]], max_length_tokens: int, truncation: Truncation
) -> tuple[list[int], list[list[int]]]:
    """Bring prompt + completion down to `max_length_tokens`, the prompt alike for all completions.

    keep_start cuts the completions' ends; keep_end cuts the prompt's start; drop rejects.

    Raises:
        Rejected: nothing would be left of a completion or of the prompt, or `drop` and too long.
    """
    longest = len(prompt) + max(map(len, completions))
    if longest <= max_length_tokens:
        return prompt, completions
    match truncation:
        case "drop":
            raise Rejected("TOO_LONG", f"{longest} tokens")
        case "keep_start":
            room = max_length_tokens - len(prompt)
            if room <= 0:
                raise Rejected("NO_RESPONSE_TOKENS", f"the prompt alone has {len(prompt)} tokens")
            return prompt, [c[:room] for c in completions]
        case "keep_end":
            keep = len(prompt) - (longest - max_length_tokens)
            if keep <= 0:
                raise Rejected("NO_RESPONSE_TOKENS", f"a completion alone has {max(map(len, completions))} tokens")
            return prompt[-keep:], completions
