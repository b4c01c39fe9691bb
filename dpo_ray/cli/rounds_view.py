"""The output of `dpo-ray rounds`: the table of online rounds for a terminal, or the same metrics as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_ray.observe.text import harmless
from dpo_ray.report.plots import typographic
from dpo_ray.report.rounds_page import Interval, RoundRow, RoundsPage, reward_words

_STYLES = {"promoted": "green", "rejected": "red"}
_COLUMNS = ("pairs", "KL", "true\nreward", "win rate\nv. initial", "win rate\nv. previous", "tokens", "seconds")


def figures(page: RoundsPage) -> list[dict[str, Any]]:
    """Return the measured metrics of each round as values for JSON."""
    return [
        dataclasses.asdict(row)
        | {name: _named(getattr(row, name)) for name in ("win_rate_initial", "win_rate_previous")}
        for row in page.rows
    ]


def print_rounds(page: RoundsPage, console: Console) -> None:
    """Print a table with a line for each round. Then print why policies were rejected, and why the rounds have ended."""
    if not page.rows:
        console.print(Text(harmless(f"{page.name}: no round has started")))
        return
    table = Table(
        title=Text(harmless(page.name)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # so that all columns fit in 80 characters; the box puts one space between them
    )
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in page.rows:
        table.add_row(str(row.number), Text(harmless(row.state), _STYLES.get(row.decision, "")), *_cells(row))
    console.print(table)
    for row in page.rows:
        if row.decision == "rejected":
            reasons = "; ".join(row.reasons) or "no reason is recorded"
            console.print(Text(harmless(f"round {row.number} rejected: {reasons}")))
    if page.stopped:
        console.print(Text(harmless(f"ended: {page.stopped}")))


def _cells(row: RoundRow) -> list[str]:
    return [
        _fixed(row.pairs, 0),
        _fixed(row.kl, 2),
        reward_words(row.true_reward),
        _rate(row.win_rate_initial),
        _rate(row.win_rate_previous),
        _fixed(row.mean_tokens, 1),
        _fixed(row.total_seconds, 0),
    ]


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else typographic(f"{value:,.{digits}f}")


def _rate(rate: Interval | None) -> str:
    """Return a win rate and its confidence interval as short text, for a terminal."""
    if rate is None or not all(map(math.isfinite, rate)):
        return "–"
    return f"{rate[0]:.1%} ({100 * rate[1]:.0f}–{100 * rate[2]:.0f})"


def _named(rate: Interval | None) -> dict[str, float] | None:
    return None if rate is None else dict(zip(("rate", "low", "high"), rate, strict=True))
