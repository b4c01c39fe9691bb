"""Tokenizes preference groups: renders their text with the chat template, encodes it, checks it, and truncates it."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup, TokenGroup

from .chat import PLAIN, Rendered, Renderer
from .encode import Encoded, Encoder
from .special_tokens import InjectionScan, control_tokens
from .template_process import TemplateProcess
from .truncate import truncate
from .turn_end import TurnEnding, generation_ends


def tokenize_groups(
    groups: Sequence[TextGroup | Rejected],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    config: DataConfig,
    process: TemplateProcess,
) -> list[TokenGroup | Rejected]:
    """Tokenize a batch. Return one result per item, in order. Items that were rejected before stay `Rejected`.

    `template` is the text of the chat template, or `plain`. A template runs in `process`. The ids are those that the
    tokenizer produces for the rendered conversation, up to the token that ends the answer's turn. The tokenizer must not
    be changed between calls.

    Raises:
        ConfigError: the template is not valid.
        DataError: the template exceeded its limits for too many groups.
    """
    renderer, encoder = Renderer(template, tokenizer, config, process), _encoder(tokenizer, template == PLAIN)
    rendered = _rendered(groups, tokenizer, renderer, config)
    encoded = iter(encoder.encode([r for r in rendered if not isinstance(r, Rejected)]))
    ending = _turn_ending(tokenizer, renderer, encoder)
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


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, config: DataConfig, model_directory: Path
) -> tuple[int, ...]:
    """List the ids of the tokens at which sampling stops.

    These are EOS, the token that the chat template writes after an answer, and the tokens that generation_config.json names.
    """
    with TemplateProcess() as process:
        renderer = Renderer(template, tokenizer, config, process)
        ending = _turn_ending(tokenizer, renderer, _encoder(tokenizer, template == PLAIN))
    own = () if ending.own_id is None else (ending.own_id,)
    return tuple(sorted({ending.eos_id, *own, *generation_ends(model_directory)}))


def _turn_ending(tokenizer: PreTrainedTokenizerBase, renderer: Renderer, encoder: Encoder) -> TurnEnding:
    """Find out which token the template writes after an answer, by rendering a short answer without special tokens."""
    ending = TurnEnding(tokenizer, plain=renderer.is_plain)
    if renderer.is_plain:
        return ending
    (rendered,) = renderer.render([TextGroup("x", ("y",), (1.0,), (), ())])
    if isinstance(rendered, Rejected):  # the template needs more than a question and an answer
        return ending
    (encoded,) = encoder.encode([rendered])
    return ending if isinstance(encoded, Rejected) else ending.after(encoded.completions[0])


def _rendered(
    groups: Sequence[TextGroup | Rejected], tokenizer: PreTrainedTokenizerBase, renderer: Renderer, config: DataConfig
) -> list[Rendered | Rejected]:
    scan = _injection_scan(tokenizer, renderer.user_turn()) if config.rules.special_tokens == "quarantine" else None
    scanned = [_scanned(group, scan) for group in groups]
    rendered = iter(renderer.render([group for group in scanned if not isinstance(group, Rejected)]))
    return [group if isinstance(group, Rejected) else next(rendered) for group in scanned]


def _scanned(group: TextGroup | Rejected, scan: InjectionScan | None) -> TextGroup | Rejected:
    token = None if scan is None or isinstance(group, Rejected) else scan.first(group)
    return (
        group if token is None else Rejected("SPECIAL_TOKEN_INJECTION", f"the text contains the special token {token}")
    )


def _token_group(group: TextGroup, encoded: Encoded, ending: TurnEnding, config: DataConfig) -> TokenGroup:
    if not encoded.prompt:
        raise Rejected("EMPTY_PROMPT", "the prompt has no tokens")
    ended = [ending.ended(ids) for ids in encoded.completions]
    if any(ids in ending.tokens for ids in ended):
        raise Rejected("NO_RESPONSE_TOKENS", "after rendering, a completion consists only of its end-of-turn token")
    prompt, completions = truncate(
        np.frombuffer(encoded.prompt, np.int32), [np.frombuffer(ids, np.int32) for ids in ended], config
    )
    chosen, rejected = ([], []) if len(completions) == 1 else (list(group.chosen), list(group.rejected))
    pairs = zip(chosen, rejected, strict=True) if chosen else itertools.combinations(range(len(completions)), 2)
    if any(completions[a].tobytes() == completions[b].tobytes() for a, b in pairs):
        raise Rejected("NO_RESPONSE_TOKENS", "after truncation, two completions have the same tokens")
    return TokenGroup(
        prompt,
        completions,
        list(group.scores),
        chosen,
        rejected,
        group.preference_probability,
        hashlib.blake2b(encoded.prompt, digest_size=16).digest(),
    )


# Building these takes longer than tokenizing a batch, so they are cached; a worker has one or two tokenizers.
_encoder = functools.lru_cache(maxsize=2)(lambda tokenizer, plain: Encoder(tokenizer, plain=plain))
_injection_scan = functools.lru_cache(maxsize=2)(
    lambda tokenizer, user_turn: InjectionScan(tokenizer, control_tokens(tokenizer, user_turn))
)
