"""Explanations of the statistics of data in plain words, for the data page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .page import format_number, format_share
from .plots import typographic

_CLEAR, _STRONG = 0.1, 0.3  # correlations of preference and length
_MAX_SOURCES = 6


def bias_words(bias: Mapping[str, float | None] | None) -> str:
    """Explain in words the length bias of pairs; `bias` is the field `length_bias` of their statistics."""
    if bias is None:
        return "There are no pairs, so there is no length bias between chosen and rejected."
    pairs, difference = bias["pairs"] or 0, bias["mean_difference_tokens"] or 0.0
    which = "longer" if difference >= 0 else "shorter"
    summary = (
        f"Chosen is the longer one in {100 * (bias['chosen_longer'] or 0):.1f} % of {pairs:,} pairs and the shorter one in "
        f"{100 * (bias['rejected_longer'] or 0):.1f} %; on average it is {abs(difference):,.1f} tokens {which} "
        f"({bias['chosen_mean_tokens']:,.1f} against {bias['rejected_mean_tokens']:,.1f})."
    )
    correlation, error = bias["correlation"], bias["standard_error"] or 0.0
    if correlation is None:
        return f"{summary} Either all lengths are the same or all pairs are ties, so they cannot be correlated."
    return f"{summary} Preference and length correlate by r = {typographic(f'{correlation:+.3f}')}: {_strength(correlation, error)}."


def bias_by_source_words(biases: Sequence[tuple[str, Mapping[str, float | None] | None]]) -> str:
    """Describe in words the length bias of each source, because opposite biases cancel out in the total.

    Return "" if the bias was measured for fewer than two sources.
    """
    known = [(name, r) for name, bias in biases if bias and (r := bias["correlation"]) is not None]
    if len(known) < 2:
        return ""
    furthest = sorted(known, key=lambda item: -abs(item[1]))[:_MAX_SOURCES]
    listed = ", ".join(f"{name} {typographic(f'{r:+.3f}')}" for name, r in furthest)
    opposite = min(r for _, r in known) < -_CLEAR and max(r for _, r in known) > _CLEAR
    return f"By source: {listed}{'; opposite biases, which cancel out in the total' if opposite else ''}."


def _strength(correlation: float, error: float) -> str:
    size = abs(correlation)
    if size <= 2 * error:
        return "no bias that can be distinguished from chance"
    towards = "longer" if correlation > 0 else "shorter"
    strength = "a slight" if size < _CLEAR else "a clear" if size < _STRONG else "a strong"
    warning = f"; a policy can win pairs by writing {towards}" if size >= _CLEAR else ""
    return f"{strength} bias towards {towards} completions{warning}"


def label_words(probabilities: Mapping[float, int]) -> str:
    """Describe in words how certain the preferences are; return "" if all of them are certain."""
    total = sum(probabilities.values())
    if not total or set(probabilities) == {1.0}:
        return ""
    shares = [f"{p:.2f} in {format_share(n, total)}" for p, n in sorted(probabilities.items(), reverse=True)[:8]]
    more = f", and {len(probabilities) - 8} others" if len(probabilities) > 8 else ""
    return f"Soft labels: the probability that chosen is the better one is {', '.join(shares)}{more} of the groups."


def sharing_words(tokens: Mapping[str, float]) -> str:
    """Describe in words how many tokens an epoch saves if each prompt is computed once for all its completions."""
    saved = format_share(tokens["unshared"] - tokens["shared"], tokens["unshared"])
    return (
        f"an epoch has {format_number(tokens['shared'])} tokens with each prompt once, {saved} fewer than the "
        f"{format_number(tokens['unshared'])} with the prompt before every completion; "
        f"padded batches of {tokens['padded_batch_groups']} groups would compute about {format_number(tokens['padded'])}."
    )
