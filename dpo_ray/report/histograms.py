"""Histograms of a run and of its data, in the same style as the report's other plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import REWARD
from .plots import SIZE_INCHES, STYLE, TICK_STEPS, Plot, dress, typographic, with_losses
from .svg import STAND_INS, embed

_MOST_BINS = 36
_COLOURS = {"completion": "train"}  # colours of parts whose name is not a colour
_OUTLIERS = 0.005  # share of values at either end that may be outside of the axis


@dataclass(frozen=True)
class Counted:
    """A histogram of whole numbers: bin i counts the numbers from edges[i] to below edges[i + 1]."""

    edges: np.ndarray  # int64 [bins + 1]
    counts: np.ndarray  # int64 [bins]
    mean: float

    @property
    def total(self) -> int:
        """Return the number of counted values."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> int:
        """Return the quantile `share` (0.5: the median), rounded down to the lower edge of its bin."""
        i = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(share * self.total))))
        return int(self.edges[min(i, len(self.counts) - 1)])

    def within(self, edges: np.ndarray) -> np.ndarray:
        """Estimate the counts in other bins with edges float64 [n], if values are spread evenly within a bin."""
        upto = np.concatenate([[0], np.cumsum(self.counts)])
        return np.diff(np.interp(edges, self.edges - 0.5, upto))


def heldout_plots(rewards: Mapping[str, Sequence[float]], kl_per_sample: Sequence[float]) -> list[Plot]:
    """Draw two histograms: the rewards of held-out pairs, and the KL estimates of sampled completions."""
    return [
        _values_plot(
            "reward-distribution",
            "Held-out rewards",
            f"{REWARD}; dashed: mean.",
            "reward",
            {"chosen": rewards.get("chosen", ()), "rejected": rewards.get("rejected", ())},
        ),
        _values_plot(
            "kl",
            "KL from the reference",
            "Estimated KL(policy ‖ reference) of each completion that the policy sampled; dashed: mean.",
            "KL (nats)",
            {"train": kl_per_sample},
        ),
    ]


def counted_plot(key: str, title: str, caption: str, x_label: str, parts: Mapping[str, Counted]) -> Plot:
    """Draw histograms of whole numbers, such as lengths in tokens, on one axis; leave out histograms without values."""
    kept = {colour: part for colour, part in parts.items() if part.total}
    if not kept:
        return Plot(key, title, caption)
    ends = [(part.quantile(_OUTLIERS), part.quantile(1 - _OUTLIERS)) for part in kept.values()]
    filled = [part.edges[:-1][part.counts > 0] for part in kept.values()]
    edges = _edges_of_whole_numbers(
        min(int(f[0]) for f in filled), max(int(f[-1]) for f in filled), ends, max(p.total for p in kept.values())
    )
    drawn = {colour: (part.within(edges), part.mean) for colour, part in kept.items()}
    beyond = round(
        sum(part.total - counts.sum() for part, (counts, _) in zip(kept.values(), drawn.values(), strict=True))
    )
    described = [
        f"{colour if len(kept) > 1 else x_label}: {part.total} values, mean {part.mean:.4g}, median {part.quantile(0.5)}."
        for colour, part in kept.items()
    ]
    svg = _draw(key, title, x_label, edges, drawn, " ".join(described))
    return _plot(key, title, caption, svg, {c: (p.total, p.mean) for c, p in kept.items()}, beyond)


def _edges_of_whole_numbers(low: int, high: int, ends: Sequence[tuple[int, int]], largest: int) -> np.ndarray:
    """Return edges of bins whose common width is a whole number. They leave out far outliers, to keep bins narrow."""
    inner_low, inner_high = min(e[0] for e in ends), max(e[1] for e in ends)
    slack = max(8, inner_high - inner_low)
    low, high = max(low, inner_low - slack // 10), min(high, inner_high + slack // 10)
    width = max(1, math.ceil((high - low + 1) / _bin_count(largest)))
    start = width * (low // width)  # so that zero, if it is inside, begins a bin
    return np.arange(start, high + width + 1, width) - 0.5


def _values_plot(key: str, title: str, caption: str, x_label: str, parts: Mapping[str, Sequence[float]]) -> Plot:
    arrays = {colour: np.asarray(values, dtype=np.float64) for colour, values in parts.items()}
    finite = {colour: values[np.isfinite(values)] for colour, values in arrays.items()}
    kept = {colour: values for colour, values in finite.items() if values.size}
    if not kept:
        return Plot(key, title, caption)
    everything = np.concatenate(list(kept.values()))
    edges = _bin_edges(everything, max(v.size for v in kept.values()))
    beyond = int(np.count_nonzero((everything < edges[0]) | (everything > edges[-1])))
    described = [
        f"{colour if len(kept) > 1 else x_label}: {values.size} values, mean {values.mean():.4g}, "
        f"median {np.median(values):.4g}, from {values.min():.4g} to {values.max():.4g}."
        for colour, values in kept.items()
    ]
    drawn = {c: (np.histogram(v, bins=edges)[0], float(v.mean())) for c, v in kept.items()}
    svg = _draw(key, title, x_label, edges, drawn, " ".join(described))
    caption = with_losses(caption, sum(values.size for values in arrays.values()) - everything.size)
    return _plot(key, title, caption, svg, {c: (v.size, float(v.mean())) for c, v in kept.items()}, beyond)


def _bin_edges(values: np.ndarray, largest_part: int) -> np.ndarray:
    """Return edges of bins of equal width. They leave out a few far outliers, if there are any, to keep bins narrow."""
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(q) for q in np.quantile(values, [_OUTLIERS, 1 - _OUTLIERS]))
    slack = inner_high - inner_low
    if slack > 0 and (high > inner_high + 2 * slack or low < inner_low - 2 * slack):
        low, high = max(low, inner_low - slack / 10), min(high, inner_high + slack / 10)
    return np.histogram_bin_edges(values, bins=_bin_count(largest_part), range=(low, high))


def _bin_count(largest_part: int) -> int:
    return min(_MOST_BINS, max(8, round(1.5 * math.sqrt(largest_part))))


def _draw(
    key: str,
    title: str,
    x_label: str,
    edges: np.ndarray,
    drawn: Mapping[str, tuple[np.ndarray, float]],
    described: str,
) -> str:
    """Draw a histogram and the mean for each part, such as chosen and rejected, over the same bins.

    The name of a part sets its colour.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axis = figure.subplots()
        for part, (counts, mean) in drawn.items():
            colour = STAND_INS[_COLOURS.get(part, part)]
            axis.stairs(counts, edges, fill=True, color=colour, alpha=0.22)
            axis.stairs(counts, edges, color=colour, linewidth=1.3)
            axis.axvline(
                float(np.clip(mean, edges[0], edges[-1])),
                color=colour,
                linestyle=(0, (4, 3)),
                linewidth=1.2,
            )
        dress(axis, "count", (0.0, None), ticks=5)
        axis.set_xlabel(x_label)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=TICK_STEPS, integer=True))
        return embed(figure, key, title, described)


def _plot(
    key: str, title: str, caption: str, svg: str, sizes_and_means: Mapping[str, tuple[int, float]], beyond: int
) -> Plot:
    """Build the plot with its legend. The caption states how many values there are, and how many are beyond the axis."""
    several = len(sizes_and_means) > 1
    legend = tuple(
        (f"{f'{part}, ' if several else ''}mean {typographic(f'{mean:,.3g}')}", f"bar fill-{_COLOURS.get(part, part)}")
        for part, (_, mean) in sizes_and_means.items()
    )
    sizes = [f"{size:,}" for size, _ in sizes_and_means.values()]
    same = several and len(set(sizes)) == 1
    caption += f" n = {sizes[0]} each." if same else f" n = {' / '.join(sizes)}."
    return Plot(key, title, f"{caption} Beyond the axis: {beyond:,}." if beyond else caption, svg, legend)
