"""Plots of the audit, which compares stored reference log-probs with log-probs that the trainer computes.

One plot shows the differences of single tokens. The other plot shows the error of each pair's margin over the pair's
difference in length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .plots import SIZE_INCHES, STYLE, TICK_STEPS, Plot, dress, typographic
from .svg import STAND_INS, embed

NO_DIFFERENCE = "No difference at all"


def drift_plot(histogram: Mapping[str, Any]) -> Plot:
    """Draw the histogram of token drift: the stored log-prob of a token minus the trainer's log-prob, in nats.

    The axis is from -range_nats to range_nats; `beyond` is the number of tokens outside.
    """
    key, title = "token-drift", "Token drift"
    caption = "Stored minus trainer's log-prob of each completion token in the sample."
    if not histogram:
        return Plot(key, title, caption)
    counts, reach, beyond = np.array(histogram["counts"]), histogram["range_nats"], histogram["beyond"]
    if not counts.size:
        return Plot(key, title, caption, instead=NO_DIFFERENCE)
    edges = np.linspace(-reach, reach, counts.size + 1)
    tokens = int(counts.sum()) + beyond
    caption += f" n = {tokens:,}." + (f" Beyond the axis: {beyond:,}." if beyond else "")
    middle = f"{counts[counts.size // 2] / tokens:.0%} within {typographic(f'{edges[-1] / counts.size:.2g}')} nats"
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axis = figure.subplots()
        axis.stairs(counts, edges.tolist(), fill=True, color=STAND_INS["train"], alpha=0.22)
        axis.stairs(counts, edges.tolist(), color=STAND_INS["train"], linewidth=1.3)
        axis.axvline(0, color=STAND_INS["ink"], linewidth=0.8)
        dress(axis, "tokens", (0.0, None), ticks=5)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=TICK_STEPS, integer=True))
        _dress_x(axis, "difference (nats)")
        return Plot(key, title, caption, embed(figure, key, title, f"{tokens:,} tokens, {middle}."))


def pair_error_plot(errors: Mapping[str, Sequence[float]], pairs: int) -> Plot:
    """Draw the error of each pair's reference margin over the pair's difference in length.

    `errors` may hold only a sample of the measured pairs, whose number is `pairs`.
    """
    key, title = "pair-error", "Pair error and length"
    caption = "Error of a pair's reference margin over the chosen completion's length minus the rejected one's. "
    caption += "A slope is a length reward."
    if not pairs:
        return Plot(key, title, caption)
    x, y = np.array(errors["length_difference"], float), np.array(errors["error_nats"], float)
    if not y.any():
        return Plot(key, title, caption, instead=NO_DIFFERENCE)
    caption += f" n = {pairs:,}." if len(x) == pairs else f" {len(x):,} of {pairs:,} pairs."
    described = f"{len(x)} pairs; lengths differ by {x.min():g} to {x.max():g} tokens, errors from {y.min():.3g} to {y.max():.3g} nats."
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axis = figure.subplots()
        for draw in (axis.axhline, axis.axvline):
            draw(0, color=STAND_INS["ink"], linewidth=0.8)
        axis.plot(x, y, color=STAND_INS["train"], linestyle="none", marker="o", alpha=0.6)
        dress(axis, "error (nats)", (None, None), ticks=5)
        _dress_x(axis, "difference in length (tokens)")
        return Plot(key, title, caption, embed(figure, key, title, described))


def _dress_x(axis: Axes, label: str) -> None:
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=TICK_STEPS))
