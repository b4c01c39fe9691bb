"""Curves of a run as SVG elements, which take their light or dark colours from the page's style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .curves import Curve, Line, curves
from .svg import STAND_INS, embed

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo_ray",
    "font.size": 10.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": STAND_INS["ink"],
    "axes.labelcolor": STAND_INS["ink"],
    "xtick.color": STAND_INS["ink"],
    "ytick.color": STAND_INS["ink"],
    "axes.edgecolor": STAND_INS["grid"],
    "grid.color": STAND_INS["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "axes.xmargin": 0.02,
}
SIZE_INCHES = (5.0, 2.8)
SMOOTHED_FROM_POINTS = 60
_MAX_POINTS = 240  # if there are more points, bands from the smallest to the largest value are drawn
TICK_STEPS = [1, 2, 2.5, 5, 10]


@dataclass(frozen=True)
class Plot:
    """One plot of a page. If there is no `svg`, `instead` says why. `legend` has (label, CSS class) pairs."""

    key: str
    title: str
    caption: str
    svg: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    instead: str = "Not measured"


@dataclass(frozen=True)
class _Values:
    """The finite values of one metric and their steps, and the number of values that were not finite."""

    steps: np.ndarray
    values: np.ndarray
    not_finite: int


def training_plots(
    train: Sequence[Mapping[str, float]],
    held_out: Sequence[Mapping[str, float]],
    best_step: int | None = None,
) -> list[Plot]:
    """Draw all curves of a training over its steps, from rows of training metrics and of held-out metrics.

    A metric that is in no row is left out of its plot.

    Args:
        best_step: the step whose weights were kept. Plots with held-out data mark this step.
    """
    return [_curve_plot(curve, train, held_out, best_step) for curve in curves(train, held_out)]


def _curve_plot(
    curve: Curve,
    train: Sequence[Mapping[str, float]],
    held_out: Sequence[Mapping[str, float]],
    best_step: int | None,
) -> Plot:
    measured = [
        (
            panel,
            [
                (line, series)
                for line in panel.lines
                if (series := _by_step(held_out if line.held_out else train, line.metric)).steps.size
            ],
        )
        for panel in curve.panels
    ]
    measured = [(panel, lines) for panel, lines in measured if lines]
    not_finite = sum(series.not_finite for _, lines in measured for _, series in lines)
    if not measured:
        return Plot(curve.key, curve.title, curve.caption, instead=curve.instead)
    marked = best_step if any(line.held_out for _, lines in measured for line, _ in lines) else None
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.subplots(len(measured), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (panel, lines) in zip(axes, measured, strict=True):
            for line, series in lines:
                _draw_line(axis, line, series)
            if marked is not None:
                axis.axvline(marked, color=STAND_INS["ink"], linewidth=0.8, linestyle=":")
            dress(axis, panel.y_label, panel.bounds, ticks=6 if len(measured) == 1 else 4)
        _dress_steps(axes[-1], [series for _, lines in measured for _, series in lines])
        figure.align_ylabels()
        described = " ".join(_describe(line.label, series) for _, lines in measured for line, series in lines)
        svg = embed(figure, curve.key, curve.title, described)
    drawn = [line for _, lines in measured for line, _ in lines]
    legend = tuple((line.label, f"{'dot' if line.held_out else 'bar'} fill-{line.colour}") for line in drawn)
    caption = with_losses(curve.caption, not_finite)
    if marked is not None:
        caption += f" Dotted: step {marked:,}, the best, whose weights were kept."
    return Plot(curve.key, curve.title, caption, svg, legend if len(drawn) > len(measured) else ())


def _by_step(rows: Sequence[Mapping[str, float]], metric: str) -> _Values:
    """Return the values of one metric by step. If a resumed run has recorded a step twice, the later value counts."""
    by_step = {
        float(row.get("step", i + 1)): float(row[metric]) for i, row in enumerate(rows) if row.get(metric) is not None
    }
    finite = sorted((step, value) for step, value in by_step.items() if math.isfinite(value))
    table = np.array(finite, dtype=np.float64).reshape(-1, 2)
    return _Values(table[:, 0], table[:, 1], len(by_step) - len(finite))


def _draw_line(axis: Axes, line: Line, found: _Values) -> None:
    colour = STAND_INS[line.colour]
    steps, values, count = found.steps, found.values, found.steps.size
    if count < SMOOTHED_FROM_POINTS or line.set_by_recipe or line.held_out:
        marker = "o" if count <= 2 or (line.held_out and count < SMOOTHED_FROM_POINTS) else ""
        dashes = (0, (3, 2)) if line.held_out else "solid"
        axis.plot(steps, values, color=colour, marker=marker, linestyle=dashes)
        return
    starts = np.arange(0, count, math.ceil(count / _MAX_POINTS))
    if starts.size == count:
        axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    else:
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        axis.fill_between(steps[starts], low, high, color=colour, alpha=0.22, linewidth=0)
    axis.plot(steps[starts], running_mean(values, smoothing_window(count))[starts], color=colour)


def smoothing_window(points: int) -> int:
    """Return over how many points a curve is smoothed: an odd number, and 1 (no smoothing) for a short curve."""
    return (points // 30) | 1 if points >= SMOOTHED_FROM_POINTS else 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Compute the running mean of values [N]. The window is odd and centred, and smaller at both ends."""
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(values.size) - half, 0)
    high = np.minimum(np.arange(values.size) + half + 1, values.size)
    return (total[high] - total[low]) / (high - low)


def with_losses(caption: str, not_finite: int) -> str:
    """Add to a plot's caption how many values were not finite, and are therefore not drawn."""
    return f"{caption} Left out as not finite: {not_finite:,}." if not_finite else caption


def _describe(label: str, found: _Values) -> str:
    steps, values = found.steps, found.values
    first = f"{label}: {values[0]:.4g} at step {steps[0]:g}"
    if steps.size == 1:
        return f"{first}."
    last = f"{values[-1]:.4g} at step {steps[-1]:g}"
    return f"{first}, {last}, between {values.min():.4g} and {values.max():.4g}."


def dress(axis: Axes, y_label: str, bounds: tuple[float | None, float | None], ticks: int) -> None:
    """Set the label, the ticks and the bounds of a plot's y axis; if a bound is None, matplotlib chooses it."""
    axis.set_ylabel(y_label)
    axis.yaxis.set_major_formatter(FuncFormatter(_tick))
    axis.xaxis.set_major_formatter(FuncFormatter(_tick))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=TICK_STEPS))
    low, high = bounds
    if low is not None:
        axis.set_ylim(bottom=low if high is None else low - 0.02)
    if high is not None:
        axis.set_ylim(top=high + 0.02)


def _dress_steps(axis: Axes, drawn: Sequence[_Values]) -> None:
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=TICK_STEPS, integer=True))
    low, high = min(f.steps[0] for f in drawn), max(f.steps[-1] for f in drawn)
    if low == high:
        axis.set_xlim(low - 1, high + 1)


def _tick(value: float, _position: int | None = None) -> str:
    """Format the value at a tick of an axis in short form: 25,000, 1.2M, 0.35, 5e-7."""
    size = abs(value)
    if size < 1e-15:  # with tiny ranges the tick at zero has a rounding error
        return "0"
    if size >= 1e6:
        return typographic(f"{value / 1e6:g}M")
    return typographic(f"{value:.3g}" if size < 1e-3 else f"{value:,g}")


def typographic(number: str) -> str:
    """Replace the hyphens in a formatted number by minus signs, and remove leading zeros of its exponent."""
    return re.sub(r"e([+-])0*", r"e\1", number).replace("e+", "e").replace("-", "\N{MINUS SIGN}")
