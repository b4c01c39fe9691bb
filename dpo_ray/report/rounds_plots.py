"""Plots of online rounds: reward over KL divergence, metrics by round, and bars with the cost of each stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import COLOURS
from .plots import SIZE_INCHES, STYLE, TICK_STEPS, Plot, dress, with_losses
from .svg import STAND_INS, embed

Outcome = Literal["initial", "promoted", "rejected", "undecided"]

_COLOURS = {"initial": "ink", "promoted": "chosen", "rejected": "rejected", "undecided": "prompt"}
_WORDS = {"initial": "initial policy", "promoted": "promoted", "rejected": "rejected", "undecided": "undecided"}
_REST = "other stages"
_AXIS_POINTS = (300.0, 145.0)  # approximate size of the axes of a SIZE_INCHES figure
_LABEL_HEIGHT, _DIGIT_WIDTH, _DOT = 9.0, 5.6, 6.0  # in points
_LABEL_PLACES = ((8, 7), (8, -7), (-8, 7), (-8, -7), (11, 0), (-11, 0), (0, 10), (0, -10))

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points."""


@dataclass(frozen=True)
class Point:
    """One policy in a plot, by the `number` of its round. Round 0 is the initial policy."""

    number: int
    outcome: Outcome
    x: float
    y: float
    interval: tuple[float, float] | None = None  # of y

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.x, self.y, *(self.interval or ()))))


def frontier_plot(given: Sequence[Point], y_label: str, level: float | None = None) -> Plot:
    """Draw the reward or win rate of each policy over its KL divergence from the initial policy.

    Args:
        level: the value of y at which neither policy is better; a dotted line marks it.
    """
    key, title = "frontier", f"{y_label.capitalize()} against KL"
    caption = "Up is better, right is further from the initial policy. The line joins the promoted rounds in order."
    points = [p for p in given if p.finite]
    if not [p for p in points if p.number]:
        return Plot(key, title, with_losses(caption, len(given) - len(points)))
    if any(p.interval for p in points):
        caption += " Bars are confidence intervals."
    if level is not None:
        caption += " Dotted: neither policy is better."
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axis = figure.subplots()
        _draw_level(axis, level)
        _draw_points(axis, points)
        dress(axis, y_label, (None, None), ticks=6)
        axis.set_xlabel("KL to the initial policy (nats per completion)")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=TICK_STEPS))
        if not _number_points(axis, points):
            caption += " Where points crowd, only some have their number."
        svg = embed(figure, key, title, " ".join(f"{_name(p)} KL {p.x:.4g}, {y_label} {p.y:.4g}." for p in points))
    return Plot(key, title, with_losses(caption, len(given) - len(points)), svg, _legend(points))


def by_round_plot(
    key: str, title: str, caption: str, y_label: str, given: Sequence[Point], level: float | None = None
) -> Plot:
    """Draw one metric of each round's policy over the rounds. If `level` is set, draw a dotted line at this value."""
    points = [p for p in given if p.finite]
    caption = with_losses(caption, len(given) - len(points))
    if not points:
        return Plot(key, title, caption)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axis = figure.subplots()
        _draw_level(axis, level)
        _draw_points(axis, points)
        dress(axis, y_label, (None, None), ticks=5)
        _dress_rounds(axis, [p.number for p in points])
        svg = embed(figure, key, title, " ".join(f"{_name(p)} {p.y:.4g}." for p in points))
    return Plot(key, title, caption, svg, _legend(points))


def stage_colours(*given: Mapping[int, Mapping[str, float]]) -> dict[str, str]:
    """Assign colours to stages, so that a stage has the same colour in every plot.

    If there are too few colours, stages of earlier plots get a colour first and, within a plot, the stages with the
    largest amounts.

    Args:
        given: for each plot, the amounts by round and stage.
    """
    wanted: dict[str, None] = {}
    for by_round in given:
        whole = _by_stage(by_round)
        wanted |= dict.fromkeys(sorted(whole, key=lambda s: -sum(whole[s])))
    kept = {*[*wanted][: len(COLOURS)]}
    order = dict.fromkeys(s for by_round in reversed(given) for s in _by_stage(by_round) if s in kept)
    return dict(zip(order, COLOURS, strict=False))


def stacked_plot(
    key: str,
    title: str,
    caption: str,
    y_label: str,
    by_round: Mapping[int, Mapping[str, float]],
    colours: Mapping[str, str],
    written: Callable[[float], str],
) -> Plot:
    """Draw a bar for each round, with one piece for each stage. Stages without a colour are added up in one piece.

    Args:
        written: formats an amount as text, for the description of the plot.
    """
    amounts = _by_stage(by_round)
    if not amounts:
        return Plot(key, title, caption)
    rounds = sorted(by_round)
    pieces = [(s, values, colours[s]) for s, values in amounts.items() if s in colours]
    if rest := [values for s, values in amounts.items() if s not in colours]:
        pieces.append((_REST, [sum(column) for column in zip(*rest, strict=True)], "grid"))
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axis = figure.subplots()
        bottoms = [0.0] * len(rounds)
        for _, values, colour in pieces:
            axis.bar(rounds, values, bottom=bottoms, width=0.72, color=STAND_INS[colour], linewidth=0)
            bottoms = [b + v for b, v in zip(bottoms, values, strict=True)]
        dress(axis, y_label, (0.0, None), ticks=5)
        _dress_rounds(axis, rounds)
        whole = [f"{s}: {written(sum(values))}." for s, values in amounts.items()]
        svg = embed(figure, key, title, f"All rounds together: {' '.join(whole)}")
    return Plot(key, title, caption, svg, tuple((s, f"bar fill-{colour}") for s, _, colour in pieces))


def _by_stage(by_round: Mapping[int, Mapping[str, float]]) -> dict[str, list[float]]:
    """Return for each stage its amounts in all rounds, in order of rounds. Stages with only zeros are left out."""
    order = dict.fromkeys(s for stages in by_round.values() for s in stages)
    amounts = {s: [by_round[r].get(s, 0.0) for r in sorted(by_round)] for s in order}
    return {s: values for s, values in amounts.items() if any(values)}


def _draw_level(axis: Axes, level: float | None) -> None:
    if level is not None:
        axis.axhline(level, color=STAND_INS["ink"], linewidth=0.8, linestyle=":")


def _draw_points(axis: Axes, points: Sequence[Point]) -> None:
    path = sorted((p for p in points if p.outcome in ("initial", "promoted")), key=lambda p: p.number)
    axis.plot([p.x for p in path], [p.y for p in path], color=STAND_INS["chosen"], zorder=2)
    for p in points:
        colour = STAND_INS[_COLOURS[p.outcome]]
        if p.interval:
            axis.plot([p.x, p.x], p.interval, color=colour, linewidth=1.0, alpha=0.6, zorder=1)
        filled = p.outcome in ("initial", "promoted")
        face = colour if filled else "none"
        axis.plot(
            p.x, p.y, linestyle="none", marker="o", markersize=5.5, markeredgecolor=colour, markerfacecolor=face,
            markeredgewidth=1.4, zorder=3,
        )  # fmt: skip


def _number_points(axis: Axes, points: Sequence[Point]) -> bool:
    """Write each round's number next to its point, without overlaps; return whether all numbers had enough space.

    Promoted rounds are numbered first, and later rounds before earlier ones.
    """
    ends = [(v for p in points for v in (p.y, *(p.interval or ()))), (p.x for p in points)]
    (y_low, y_high), (x_low, x_high) = (_spread([*values]) for values in ends)
    axis.set_xlim(x_low, x_high)
    axis.set_ylim(y_low, y_high)
    width, height = _AXIS_POINTS
    at = {
        p.number: ((p.x - x_low) / (x_high - x_low) * width, (p.y - y_low) / (y_high - y_low) * height) for p in points
    }
    taken = [(x - _DOT / 2, y - _DOT / 2, x + _DOT / 2, y + _DOT / 2) for x, y in at.values()]
    written = 0
    wanted = sorted((p for p in points if p.number), key=lambda p: (p.outcome != "promoted", -p.number))
    for p in wanted:
        x, y = at[p.number]
        half = _DIGIT_WIDTH * len(str(p.number)) / 2
        for right, up in _LABEL_PLACES:
            cx, cy = x + right, y + up
            box = (cx - half, cy - _LABEL_HEIGHT / 2, cx + half, cy + _LABEL_HEIGHT / 2)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                written += 1
                axis.annotate(
                    str(p.number), (p.x, p.y), (right, up), textcoords="offset points", ha="center", va="center"
                )
                break
    return written == len(wanted)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Return limits of an axis that leave free space around the values, for the numbers next to their points."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _dress_rounds(axis: Axes, rounds: Sequence[int]) -> None:
    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=TICK_STEPS, integer=True))
    room = 0.6 if len({*rounds}) > 1 else 1.0  # a tick needs a whole number within the limits
    axis.set_xlim(min(rounds) - room, max(rounds) + room)


def _name(point: Point) -> str:
    return f"Round {point.number}, {point.outcome}:" if point.number else "Initial policy:"


def _legend(points: Sequence[Point]) -> tuple[tuple[str, str], ...]:
    present = {p.outcome for p in points}
    marks = {o: f"fill-{c}" if o in ("initial", "promoted") else f"fill-card stroke-{c}" for o, c in _COLOURS.items()}
    return tuple((_WORDS[outcome], f"dot {mark}") for outcome, mark in marks.items() if outcome in present)
