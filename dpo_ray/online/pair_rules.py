"""The rules that turn the judged completions of a prompt into pairs, or find the reason why there are no pairs."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dpo_ray.config.online import RoundPairingConfig

REASONS = {
    "too_few_completions": "fewer than two completions were sampled",
    "abstained": "the judge scored fewer than two completions",
    "low_agreement": "the judges agree less than pairing.min_agreement",
    "truncated": "fewer than two completions ended within the token limit",
    "identical": "the completions are identical",
    "tie": "all completions have the same score",
    "below_margin": "no two scores differ by more than pairing.min_margin",
    "length_ratio": "one completion of each pair is more than pairing.max_length_ratio times as long as the other",
}
"""Explanations of why a prompt has no pairs, by reason code. If several reasons apply, the first one counts."""


@dataclass(frozen=True)
class Paired:
    """The result of pairing the completions of one prompt: pairs, a ranked list, or the reason why there is neither.

    Completions are identified by their indices.
    """

    pairs: tuple[tuple[int, int], ...] = ()  # (better, worse)
    listed: tuple[int, ...] = ()  # best first; with pairs=list
    dropped: str | None = None  # a key of REASONS


def adjusted_scores(
    scores: Sequence[float | None], lengths: Sequence[int], config: RoundPairingConfig
) -> list[float | None]:
    """Return the scores by which completions are ranked: each score minus the penalty for the completion's length.

    The result is None for a completion without a finite score, because the judge abstains on this completion.
    """
    return [
        None if score is None or not math.isfinite(score) else score - config.length_penalty * length
        for score, length in zip(scores, lengths, strict=True)
    ]


def pairs_of(
    scores: Sequence[float | None],
    lengths: Sequence[int],
    truncated: Sequence[bool],
    completion_keys: Sequence[Hashable],
    agreement: float,
    config: RoundPairingConfig,
    pair_truncated: bool,
    seed: int,
) -> Paired:
    """Pair the completions of one prompt by the rules of the recipe's section `online.pairing`.

    If the recipe sets `pairs: list`, return one ranked list of the completions instead of pairs. The limit on the ratio of
    the two lengths in a pair does not apply then.

    Args:
        scores: score of each completion; higher is better. None or a number that is not finite: the judge abstains.
        lengths: length of each completion in tokens.
        truncated: for each completion, whether the token limit cut it off.
        completion_keys: a key for each completion, equal for equal completions. Of equal completions, only the first
            usable one counts.
        agreement: how far the judges agree on this prompt, from 0 to 1.
        pair_truncated: whether truncated completions may be in pairs.
        seed: seed of the random choice, which depends on the run's seed, the round and the prompt.
    """
    if len(scores) < 2:
        return Paired(dropped="too_few_completions")
    adjusted = adjusted_scores(scores, lengths, config)
    values = {i: score for i, score in enumerate(adjusted) if score is not None}
    if len(values) < 2:
        return Paired(dropped="abstained")
    if agreement < config.min_agreement:
        return Paired(dropped="low_agreement")
    kept = [i for i in values if pair_truncated or not truncated[i]]
    if len(kept) < 2:
        return Paired(dropped="truncated")
    kept = list({completion_keys[i]: i for i in reversed(kept)}.values())
    if len(kept) < 2:
        return Paired(dropped="identical")
    return _paired(sorted(kept, key=lambda i: (-values[i], i)), values, lengths, config, seed)


def _paired(
    ranked: Sequence[int], values: dict[int, float], lengths: Sequence[int], config: RoundPairingConfig, seed: int
) -> Paired:
    """Pair the usable completions of one prompt; there are at least two.

    Args:
        ranked: indices of these completions, best first.
        values: for each of these completions, the score by which the completion was ranked.
    """
    best, worst = ranked[0], ranked[-1]
    if values[best] == values[worst]:
        return Paired(dropped="tie")
    if values[best] - values[worst] <= config.min_margin:
        return Paired(dropped="below_margin")
    if config.pairs == "list":
        return Paired(listed=tuple(ranked))
    apart = [(i, j) for i, j in _candidates(ranked, config) if values[i] - values[j] > config.min_margin]
    fitting = [(i, j) for i, j in apart if _like_long(lengths[i], lengths[j], config.max_length_ratio)]
    if not fitting:
        # No other reason is possible: the best and the worst differ enough, and this pair is a candidate in every mode.
        return Paired(dropped="length_ratio")
    if config.pairs == "best_random":
        fitting = [fitting[int(random.Random(seed).random() * len(fitting))]]
    return Paired(pairs=tuple(fitting))


def _candidates(ranked: Sequence[int], config: RoundPairingConfig) -> list[tuple[int, int]]:
    """List the pairs that the mode `config.pairs` allows, each with the better completion first.

    For `best_random`, the caller then chooses one of these pairs.
    """
    match config.pairs:
        case "best_worst":
            return [(ranked[0], ranked[-1])]
        case "best_random":
            return [(ranked[0], j) for j in ranked[1:]]
        case "top_bottom":
            k = min(config.k, len(ranked) // 2)  # so that no completion is on both sides
            return [(i, j) for i in ranked[:k] for j in ranked[-k:]]
        case _:
            return [(i, j) for place, i in enumerate(ranked) for j in ranked[place + 1 :]]


def _like_long(first: int, second: int, max_ratio: float | None) -> bool:
    return max_ratio is None or max(first, second) <= max_ratio * min(first, second)
