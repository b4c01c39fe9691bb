"""Draw the panels of cluster/grafana/dpo_ray.json without Grafana, from the data of a Prometheus server.

    python tools/dashboard.py http://127.0.0.1:9090 RUN --minutes 10 --out docs/dashboard.svg

Every panel's own queries are sent to Prometheus; titles, units and places are those of the dashboard. Grafana looks different.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common.figure_style import STYLE  # noqa: E402

DASHBOARD = ROOT / "cluster/grafana/dpo_ray.json"
COLUMNS, ROW_INCHES, WIDTH_INCHES = 24, 0.25, 16.0  # of Grafana's grid
COLOURS = ("#0069b4", "#d05a00", "#00875f", "#6b7280", "#8a4fbf", "#b0263a")
POINTS = 240  # of a line


@dataclass(frozen=True)
class Target:
    """One query of a panel. In its legend, {{label}} stands for the value of a label."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel of the dashboard; x, y, width and height are in cells of Grafana's grid. A title of panels has no targets."""

    title: str
    kind: str
    unit: str
    x: int
    y: int
    width: int
    height: int
    targets: tuple[Target, ...]


def panels(dashboard: Path) -> list[Panel]:
    """Read all panels of a dashboard from Grafana's JSON."""
    found = []
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        place, defaults = panel["gridPos"], panel.get("fieldConfig", {}).get("defaults", {})
        targets = tuple(Target(t["expr"], t["legendFormat"]) for t in panel.get("targets", ()))
        size = place["x"], place["y"], place["w"], place["h"]
        found.append(Panel(panel["title"], panel["type"], defaults.get("unit", ""), *size, targets))
    return found


def expression(text: str, run: str) -> str:
    """Replace Grafana's variables in a query, as Grafana does for one run in any namespace."""
    name = re.escape(run).replace("\\", "\\\\")  # a pattern within a string of PromQL
    values = {"$namespace": ".*", "$run": name, "$__rate_interval": "1m"}
    for variable, value in values.items():
        text = text.replace(variable, value)
    return text


def draw(server: str, run: str, begin: float, end: float, out: Path) -> None:
    """Draw all panels with data of one run, between two Unix times, into an SVG file."""
    drawn = panels(DASHBOARD)
    rows = max(p.y + p.height for p in drawn)
    with style.context(["default", STYLE | {"font.size": 8.0, "lines.linewidth": 1.2}]), httpx.Client() as client:
        figure = Figure(figsize=(WIDTH_INCHES, rows * ROW_INCHES))
        for panel in drawn:
            left, top = panel.x / COLUMNS, 1 - panel.y / rows
            width, height = panel.width / COLUMNS, panel.height / rows
            if not panel.targets:
                figure.text(0.01, top - 0.7 * height, panel.title, weight="bold", fontsize=11)
                continue
            found = [
                (_legend(target.legend, series["metric"]), series["values"])
                for target in panel.targets
                for series in _series(client, server, expression(target.expression, run), begin, end)
            ]
            pad = 0.8 / rows
            place = (left + 0.035, top - height + 1.4 * pad, width - 0.05, height - 2.6 * pad)
            _draw_panel(figure.add_axes(place), panel, found, (begin, end), run)
        figure.savefig(out, format="svg", metadata={"Date": None})
    out.write_text("".join(f"{line.rstrip()}\n" for line in out.read_text().splitlines()))


def _series(client: httpx.Client, server: str, query: str, begin: float, end: float) -> list[dict[str, Any]]:
    step = max(1.0, (end - begin) / POINTS)
    parameters = urlencode({"query": query, "start": begin, "end": end, "step": step})
    answer = client.get(f"{server}/api/v1/query_range?{parameters}").raise_for_status()
    return answer.json()["data"]["result"]


def _legend(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), text)


def _draw_panel(
    axis: Axes, panel: Panel, found: Sequence[tuple[str, list[list[Any]]]], period: tuple[float, float], run: str
) -> None:
    axis.set_title(panel.title, loc="left", fontsize=9)
    if panel.kind == "stat":
        axis.set_axis_off()
        last = float(found[-1][1][-1][1]) if found else None
        text = "no data" if last is None else f"{last:.0%}" if panel.unit == "percentunit" else f"{last:g}"
        axis.text(0.5, 0.45, text, ha="center", va="center", fontsize=20, transform=axis.transAxes)
        return
    for colour, (legend, values) in zip(COLOURS * 3, found, strict=False):
        times, numbers = [float(t) - period[0] for t, _ in values], [float(v) for _, v in values]
        marker = "." if len(values) < 3 else None
        axis.plot(times, numbers, color=colour, marker=marker, label=legend.removeprefix(run).strip())
    if not found:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", color="#6b7280", transform=axis.transAxes)
        axis.set_yticks([])
        axis.set_xticks([])
        return
    if len(found) > 1:
        axis.legend(frameon=False, fontsize=7, ncols=2)
    axis.set_xlim(0, period[1] - period[0])
    forms = {"percentunit": PercentFormatter(1.0), "bytes": FuncFormatter(lambda v, _: f"{v / 2**30:.3g} GiB")}
    axis.yaxis.set_major_formatter(forms.get(panel.unit, FuncFormatter(lambda v, _: f"{v:.6g}")))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} s"))
    axis.tick_params(length=2)


def main() -> None:
    """Read the arguments, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="the address of Prometheus")
    parser.add_argument("run", help="the name of the run")
    parser.add_argument("--minutes", type=float, default=10, help="how far to look back; default: %(default)g")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    arguments = parser.parse_args()
    now = time.time()
    draw(arguments.server, arguments.run, now - 60 * arguments.minutes, now, arguments.out)


if __name__ == "__main__":
    main()
