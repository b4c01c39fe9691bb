"""Builds the pairs of a group, and the probability of its preference, from the scores of its completions or from verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from dpo_ray.config.data import PairingConfig

from .admission import Rejected
from .groups import TextGroup

TIE = 0.5


def paired(group: TextGroup, config: PairingConfig) -> TextGroup:
    """Sort the completions, best first, and build pairs. A group with pairs, or with a single completion, stays unchanged.

    Raises:
        Rejected: TIE, LOW_MARGIN or DISAGREEMENT, if the recipe's `data.pairing` excludes such rows.
    """
    if group.chosen or len(group.completions) == 1:
        return group
    return _by_verdicts(group, config) if group.verdicts else _by_scores(group, config)


def _by_verdicts(group: TextGroup, config: PairingConfig) -> TextGroup:
    """Build a pair from two completions that annotators compared. The scores are 1 for chosen and 0 for rejected."""
    probability = _probability(group.verdicts, config)
    if probability == TIE:
        if config.ties == "drop":
            raise Rejected("TIE", f"the verdicts are {', '.join(map(str, group.verdicts))}")
        return _reduced(replace(group, scores=(TIE, TIE)), [0, 1], [(0, 1)], TIE)
    scored = replace(group, scores=(1.0, 0.0) if probability > TIE else (0.0, 1.0))
    order = [0, 1] if probability > TIE else [1, 0]
    return _reduced(scored, order, [(0, 1)], float(max(probability, 1 - probability)))


def _probability(verdicts: Sequence[int], config: PairingConfig) -> Fraction:
    """Return the exact probability that the first completion is the better one; 1/2 is a tie.

    Raises:
        Rejected: DISAGREEMENT, if the recipe requires unanimous verdicts, but the verdicts differ.
    """
    ties, first, second = (verdicts.count(v) for v in (0, 1, 2))
    match config.annotators:
        case "probability":
            return Fraction(2 * first + ties, 2 * len(verdicts))
        case "majority":  # the most frequent of the three verdicts; a tie if two are equally frequent
            return Fraction(1 + (first > max(second, ties)) - (second > max(first, ties)), 2)
        case "unanimous":
            if max(ties, first, second) < len(verdicts):
                raise Rejected("DISAGREEMENT", f"the verdicts are {', '.join(map(str, verdicts))}")
            return Fraction(1 + bool(first) - bool(second), 2)


def _by_scores(group: TextGroup, config: PairingConfig) -> TextGroup:
    order = sorted(range(len(group.scores)), key=lambda i: -group.scores[i])  # stable: equal scores keep their order
    ranked = [group.scores[i] for i in order]
    best, worst = 0, len(order) - 1
    if ranked[best] == ranked[worst]:
        return _all_equal(group, order, config)
    if ranked[best] - ranked[worst] < config.min_margin:
        raise Rejected(
            "LOW_MARGIN", f"the scores of the best and the worst completion differ by {ranked[best] - ranked[worst]:g}"
        )
    match config.pairs:
        case "list":
            return _reduced(group, order, [])
        case "best_worst":
            pairs = [(best, worst)]
        case "all":
            pairs = [(i, j) for i in range(len(order)) for j in range(i + 1, len(order))]
        case "adjacent":
            pairs = [(i, i + 1) for i in range(worst)]
    kept = [(i, j) for i, j in pairs if ranked[i] > ranked[j] and ranked[i] - ranked[j] >= config.min_margin]
    if not kept:
        raise Rejected(
            "LOW_MARGIN", f"no two neighbours in the ranking have scores that differ by {config.min_margin:g} or more"
        )
    return _reduced(group, order, kept)


def _all_equal(group: TextGroup, order: list[int], config: PairingConfig) -> TextGroup:
    """Build one pair, which is a tie, from completions whose scores are all equal.

    Raises:
        Rejected: TIE, if data.pairing.ties is `drop`, or if there are more than two completions and data.pairing.pairs is
            not `best_worst`.
    """
    if config.ties == "drop" or (len(order) > 2 and config.pairs != "best_worst"):
        raise Rejected("TIE", f"all {len(order)} scores are {group.scores[0]:g}")
    return _reduced(group, order, [(0, len(order) - 1)], TIE)


def _reduced(
    group: TextGroup, order: Sequence[int], pairs: Sequence[tuple[int, int]], probability: float = 1.0
) -> TextGroup:
    """Sort the completions, and drop the completions that no pair uses. If there are no pairs, none is dropped.

    Args:
        order: the indices of the completions, best first.
        pairs: (chosen, rejected) as positions in `order`.
    """
    places = sorted({place for pair in pairs for place in pair}) or range(len(order))
    at = {place: k for k, place in enumerate(places)}
    return replace(
        group,
        completions=tuple(group.completions[order[place]] for place in places),
        scores=tuple(group.scores[order[place]] for place in places),
        chosen=tuple(at[i] for i, _ in pairs),
        rejected=tuple(at[j] for _, j in pairs),
        preference_probability=probability,
        verdicts=(),
    )
