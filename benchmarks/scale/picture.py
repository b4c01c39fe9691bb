"""The picture of the simulation: balance, building the schedule, and goodput, over the world size."""

from __future__ import annotations

from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.figure_style import STYLE
from benchmarks.scale.figures import Figures
from benchmarks.scale.steps import HH

SMALL = STYLE | {"font.size": 9.0, "lines.marker": "o", "lines.markersize": 4.0}
COLOURS = ("#d05a00", "#0069b4", "#00875f", "#6b7280")


def draw(found: Figures, out: Path) -> None:
    """Draw three panels side by side into an SVG file."""
    with style.context(["default", SMALL]):
        figure = Figure(figsize=(10.5, 3.8), layout="constrained")
        balance, schedule, goodput = figure.subplots(1, 3)
        _balance(balance, found)
        _schedule(schedule, found)
        _goodput(goodput, found)
        ranks = sorted({case.ranks for case, _ in found.balance})
        for axis in (balance, schedule, goodput):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ranks, [f"{r:,}" for r in ranks])
            axis.set_xlabel("ranks")
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(out, format="svg", metadata={"Date": None})
    out.write_text("".join(f"{line.rstrip()}\n" for line in out.read_text().splitlines()))


def _balance(axis: Axes, found: Figures) -> None:
    own = [(case, balance) for case, balance in found.balance if case.lengths == HH]
    each = sorted({case.groups_per_step // case.ranks for case, _ in own if case.groups_per_step > 512})
    for colour, groups in zip(COLOURS, each, strict=False):
        drawn = [(c.ranks, b.lockstep) for c, b in own if c.groups_per_step == groups * c.ranks]
        axis.plot(*zip(*drawn, strict=True), color=colour, label=f"{groups} groups a rank")
    drawn = [(c.ranks, b.lockstep) for c, b in own if c.groups_per_step == 512]
    axis.plot(*zip(*drawn, strict=True), color=COLOURS[3], linestyle=":", label="512 groups a step")
    axis.set_yscale("log")
    axis.set_yticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    axis.set_title("time of a step over its ideal, HH-like")


def _schedule(axis: Axes, found: Figures) -> None:
    own = [s for s in found.schedules if s.packed.data == HH.name]
    ranks = [s.plane.ranks for s in own]
    axis.plot(ranks, [s.dealing_hours for s in own], color=COLOURS[0], label="dealing rows to buckets")
    axis.plot(ranks, [s.packing_hours for s in own], color=COLOURS[1], label="packing")
    axis.axhline(found.order.seconds / 3600, color=COLOURS[2], linestyle="--", label="order")
    axis.set_yscale("log")
    axis.set_title(f"CPU hours of a schedule of {found.order.groups / 1e6:,.0f} M groups")


def _goodput(axis: Axes, found: Figures) -> None:
    for colour, name in zip(COLOURS, dict.fromkeys(s.checkpoint.model.name for s in found.survivals), strict=False):
        own = [s for s in found.survivals if s.checkpoint.model.name == name and not s.checkpoint.hybrid]
        ranks = [s.checkpoint.ranks for s in own]
        axis.plot(ranks, [100 * s.best.goodput() for s in own], color=colour, label=f"{name}, chosen interval")
        axis.plot(ranks, [100 * s.default.goodput() for s in own], color=colour, linestyle=":", label="100 steps")
    axis.set_ylim(0, 102)
    axis.set_title("goodput, %")
