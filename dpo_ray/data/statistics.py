"""Statistics of preference groups: lengths, length bias, soft labels, and the tokens saved by computing a prompt only once.

The parts (files) are measured separately, and then added up. All sums are sums of integers, so the order of the parts does
not matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .schemas import TOKENS

SUB_BINS = 32  # bins per doubling: lengths are exact below 64, and accurate to 1/32 above
PREFERENCE_UNITS = 1_000_000  # 2 p - 1 is counted in millionths
PADDED_BATCH_GROUPS = 8  # groups in the padded batch that packing is compared with
QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}

Statistics = dict[str, Any]


def measure(table: pa.Table) -> Statistics:
    """Compute the statistics of one table of groups (schema TOKENS; other columns are ignored).

    Returns:
        Counts, sums and histograms, in valid JSON, for `merged` to add up. The histograms count tokens:
        per group: prompt, and prompt + longest completion (`whole`)
        per pair: chosen, rejected, and their difference
        per completion: completion
    """
    prompt = _lengths(table["prompt_ids"])
    groups = len(prompt)
    per_group = _lengths(table["completion_ids"])
    completion = _lengths(_flat(table["completion_ids"]))
    first = np.cumsum(per_group) - per_group  # the index of each group's first completion among all completions
    pairs_per_group = _lengths(table["chosen"])
    group_of_pair = np.repeat(np.arange(groups), pairs_per_group)
    chosen, rejected = (
        completion[first[group_of_pair] + _flat(table[side]).to_numpy().astype(np.int64)]
        for side in ("chosen", "rejected")
    )
    probability = table["preference_probability"].to_numpy().astype(np.float64)
    preference = np.rint((2 * probability - 1) * PREFERENCE_UNITS).astype(np.int64)[group_of_pair]
    difference = chosen - rejected
    longest = np.maximum.reduceat(completion, first) if groups else completion
    unpaired = per_group == 1
    label = _flat(table["scores"]).to_numpy()[first[unpaired]]
    percents = np.rint(100 * probability[pairs_per_group > 0]).astype(np.int64)
    return {
        "groups": groups,
        "completions": len(completion),
        "pairs": len(chosen),
        "unpaired": int(unpaired.sum()),
        "desirable": int((label > 0.5).sum()),  # unpaired groups whose completion is good
        "lists": int((~unpaired & (pairs_per_group == 0)).sum()),
        "prompt": _histogram(prompt),
        "completion": _histogram(completion),
        "chosen": _histogram(chosen),
        "rejected": _histogram(rejected),
        "chosen_longer_by": _histogram(difference[difference > 0]),
        "rejected_longer_by": _histogram(-difference[difference < 0]),
        "whole": _histogram(prompt + longest),
        "tokens_shared": int(prompt.sum() + completion.sum()),
        "tokens_unshared": int((prompt * per_group).sum() + completion.sum()),
        "tokens_as_pairs": int(
            (2 * prompt[group_of_pair] + chosen + rejected).sum()
            + np.where(pairs_per_group == 0, prompt * per_group, 0).sum()
            + completion[np.repeat(pairs_per_group == 0, per_group)].sum()
        ),
        "sum_preference_difference": int((preference * difference).sum()),
        "sum_preference_squared": int((preference**2).sum()),
        "sum_difference_squared": int((difference**2).sum()),
        "probability_percent": {str(p): int(n) for p, n in zip(*np.unique(percents, return_counts=True), strict=True)},
    }


def merged(parts: Iterable[Mapping[str, Any]]) -> Statistics:
    """Add up the statistics of several parts, in any order. Without parts, return the statistics of an empty table."""
    return functools.reduce(_added, parts, measure(TOKENS.empty_table()))


def summary(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the numbers of a report from merged statistics. A number is None if there is no data for it.

    Returns:
        The counts, and:
        `lengths`: count, mean, quantiles and maximum of the tokens of prompt, chosen, rejected, completion and whole.
        `length_bias`: see `_length_bias`.
        `tokens`: the tokens of an epoch, and the fraction saved by computing a prompt only once.
        `longest`: the largest number of tokens of a group, and how many groups have it.
        `probabilities`: for each preference probability, the number of groups with pairs that have it.
    """
    counts = ("groups", "completions", "pairs", "unpaired", "desirable", "lists")
    parts = ("prompt", "chosen", "rejected", "completion", "whole")
    return {
        **{name: statistics[name] for name in counts},
        "lengths": {name: _described(statistics[name]) for name in parts},
        "length_bias": _length_bias(statistics),
        "tokens": _tokens(statistics),
        "longest": {"tokens": statistics["whole"]["max"], "groups": statistics["whole"]["at_max"]},
        "probabilities": {int(p) / 100: n for p, n in sorted(_by_number(statistics["probability_percent"]))},
    }


def bin_edges(bins: int) -> np.ndarray:
    """Return the edges int64 [bins + 1] of a histogram: bin i counts the lengths from edge i up to below edge i + 1."""
    i = np.arange(bins + 1, dtype=np.int64)
    doublings = np.maximum(i // SUB_BINS - 1, 0)
    return (i - SUB_BINS * doublings) << doublings


def quantile(histogram: Mapping[str, Any], share: float) -> int:
    """Return a quantile of the lengths in a histogram. `share` is its level, from 0 to 1: 0.5 is the median.

    A result below 64 tokens is exact. The relative error of a larger result is at most 1/32.
    """
    counts = np.array(histogram["bins"], np.int64)
    upto = np.cumsum(counts)
    target = max(1, math.ceil(share * histogram["count"]))
    i = int(np.searchsorted(upto, target))
    low, high = (int(edge) for edge in bin_edges(len(counts))[i : i + 2])
    within = (target - (upto[i] - counts[i])) / counts[i]
    return min(low + int(within * (high - 1 - low)), histogram["max"])


def _flat(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.call_function("list_flatten", [lists])


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return pc.call_function("list_value_length", [lists]).to_numpy().astype(np.int64)


def _histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Build a histogram of lengths, int64 [n] >= 0. `at_max` is the number of lengths that equal the maximum."""
    longest = int(lengths.max(initial=0))
    # frexp gives the exponent of a double, which holds every length exactly
    doublings = np.maximum(np.frexp(lengths.astype(np.float64))[1] - int(math.log2(SUB_BINS)) - 1, 0)
    bins = SUB_BINS * doublings + (lengths >> doublings)
    return {
        "count": len(lengths),
        "sum": int(lengths.sum()),
        "max": longest,
        "at_max": int((lengths == longest).sum()),
        "bins": np.bincount(bins, minlength=1).tolist(),
    }


def _added(a: Any, b: Any) -> Any:
    if isinstance(a, Mapping):
        if "at_max" in a:
            return _added_histograms(a, b)
        return {key: _added(a.get(key, 0), b.get(key, 0)) for key in sorted({*a, *b})}
    return a + b


def _added_histograms(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    bins = [0] * max(len(a["bins"]), len(b["bins"]))
    for each in (a, b):
        for i, count in enumerate(each["bins"]):
            bins[i] += count
    longest = max(a["max"], b["max"])
    return {
        "count": a["count"] + b["count"],
        "sum": a["sum"] + b["sum"],
        "max": longest,
        "at_max": sum(each["at_max"] for each in (a, b) if each["max"] == longest),
        "bins": bins,
    }


def _described(histogram: Mapping[str, Any]) -> dict[str, float] | None:
    if not histogram["count"]:
        return None
    return {
        "count": histogram["count"],
        "mean": histogram["sum"] / histogram["count"],
        **{name: quantile(histogram, share) for name, share in QUANTILES.items()},
        "max": histogram["max"],
    }


def _length_bias(statistics: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Compute the correlation of preference and length over pairs.

    r = sum(s l) / sqrt(sum(s^2) sum(l^2)), with s = 2 p - 1 and l = chosen tokens - rejected tokens, where p is the
    preference probability. s and l both change their sign when a pair is reversed, so no mean is subtracted. For
    independent pairs without a bias, r is 0 with a standard error of about 1 / sqrt(pairs).
    """
    pairs = statistics["pairs"]
    if not pairs:
        return None
    longer, shorter = statistics["chosen_longer_by"], statistics["rejected_longer_by"]
    scale = math.sqrt(statistics["sum_preference_squared"]) * math.sqrt(statistics["sum_difference_squared"])
    return {
        "pairs": pairs,
        "correlation": statistics["sum_preference_difference"] / scale if scale else None,
        "standard_error": 1 / math.sqrt(pairs),
        "chosen_longer": longer["count"] / pairs,
        "rejected_longer": shorter["count"] / pairs,
        "mean_difference_tokens": (longer["sum"] - shorter["sum"]) / pairs,
        "chosen_mean_tokens": statistics["chosen"]["sum"] / pairs,
        "rejected_mean_tokens": statistics["rejected"]["sum"] / pairs,
    }


def _tokens(statistics: Mapping[str, Any]) -> dict[str, float]:
    """Compute the number of tokens of one epoch for several ways to compute the prompts.

    `shared` counts a prompt once per group, `unshared` once per completion, and `as_pairs` twice per pair.
    `padded` is the expected number if each completion is computed with its prompt, and padded to the longest text in a
    batch of PADDED_BATCH_GROUPS randomly drawn groups.
    """
    shared, unshared = statistics["tokens_shared"], statistics["tokens_unshared"]
    return {
        "shared": shared,
        "unshared": unshared,
        "as_pairs": statistics["tokens_as_pairs"],
        "padded": round(statistics["completions"] * _expected_longest(statistics["whole"], PADDED_BATCH_GROUPS)),
        "padded_batch_groups": PADDED_BATCH_GROUPS,
        "saved_fraction": 1 - shared / unshared if unshared else 0.0,
    }


def _expected_longest(histogram: Mapping[str, Any], draws: int) -> float:
    if not histogram["count"]:
        return 0.0
    counts = np.array(histogram["bins"], np.float64)
    edges = bin_edges(len(counts))
    middle = np.minimum((edges[:-1] + edges[1:] - 1) / 2, histogram["max"])
    at_most = np.cumsum(counts) / histogram["count"]
    return float((middle * np.diff(at_most**draws, prepend=0.0)).sum())


def _by_number(counts: Mapping[str, int]) -> Sequence[tuple[int, int]]:
    return [(int(number), count) for number, count in counts.items()]
