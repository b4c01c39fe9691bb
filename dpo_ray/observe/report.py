"""The run report: one HTML file without scripts or outside requests, to read, print or send."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dpo_ray import __version__
from dpo_ray.observe.plots import (
    SMOOTHED_FROM_POINTS,
    heldout_plots,
    length_plot,
    smoothing_window,
    training_plots,
    typographic,
)

SAMPLE_CHARACTERS = 1_200
EXAMPLE_CHARACTERS = 240
MAX_SAMPLES = 40
_COUNTS = ("rows_in", "admitted", "quarantined", "duplicates")
_TEMPLATE = "report.html.jinja"

# Control characters are not allowed in HTML; they are shown as Unicode's pictures of them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


@dataclass(frozen=True)
class Tile:
    """Hold one figure of the headline; a number is formatted, a string is shown as it is."""

    label: str
    value: str | float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Hold all that a report shows; what is left empty is reported as not measured.

    All text may be foreign: it is escaped, and samples and examples are cut to a length that a page can bear.

    name, created, what: the run, its time (ISO 8601) and one sentence on it.
    headline, comparison: tiles, and rows of (measure, reference, policy).
    train_metrics, eval_metrics: a row per measured step under TRL's names and `step`; some may be missing.
    heldout_rewards: `chosen` and `rejected` rewards; kl_per_sample: nats per completion; lengths: tokens of
      `prompt`, `chosen` and `rejected`.
    account: rows of source, split, rows_in, admitted, quarantined, duplicates.
    reasons: rows of reason, meaning, rows, example, for what was quarantined.
    audit: the figures of the reference audit and `passed`; audit_note: why there is none, or what followed.
    samples: rows of prompt, reference, policy and, where judged, reference_score, policy_score.
    stages: rows of stage, key, state and, where known, seconds, rows, note.
    """

    name: str
    created: str
    what: str
    headline: Sequence[Tile] = ()
    comparison: Sequence[tuple[str, str, str]] = ()
    train_metrics: Sequence[Mapping[str, float]] = ()
    eval_metrics: Sequence[Mapping[str, float]] = ()
    heldout_rewards: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kl_per_sample: Sequence[float] = ()
    lengths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    account: Sequence[Mapping[str, Any]] = ()
    reasons: Sequence[Mapping[str, Any]] = ()
    audit: Mapping[str, float | str | bool] = field(default_factory=dict)
    audit_note: str = ""
    samples: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    recipe_yaml: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)


def render_report(data: ReportData) -> str:
    """Return the report as HTML; the same data gives the same bytes.

    Raises KeyError or jinja2.UndefinedError where a row of `data` lacks a required field.
    """
    steps = len(data.train_metrics)
    html = (
        _environment()
        .from_string(_template_text())
        .render(
            data=data,
            generator=f"dpo_ray {__version__}",
            training=training_plots(data.train_metrics, data.eval_metrics),
            heldout=heldout_plots(data.heldout_rewards, data.kl_per_sample),
            lengths=length_plot(data.lengths),
            window=smoothing_window(steps) if steps >= SMOOTHED_FROM_POINTS else 0,
            total=_total(data.account),
            unaccounted=sum(abs(unaccounted_rows(row)) for row in data.account),
            count_names=_COUNTS,
            samples=data.samples[:MAX_SAMPLES],
            sample_characters=SAMPLE_CHARACTERS,
            example_characters=EXAMPLE_CHARACTERS,
            audit_figures={name: value for name, value in data.audit.items() if name != "passed"},
        )
    )
    # A lone surrogate, which broken input can hold, has no UTF-8 form: the file could not be written.
    return html.lstrip().translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")


def unaccounted_rows(row: Mapping[str, Any]) -> int:
    """Return rows in - (admitted + quarantined + duplicates): 0 where every row is accounted for."""
    return row["rows_in"] - row["admitted"] - row["quarantined"] - row["duplicates"]


def format_number(value: float | str | bool | None) -> str:
    """Write a figure for a reader: four significant digits, thousands apart; text stays as it is."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and (isinstance(value, int) or abs(value) < 1e6):
        return typographic(f"{int(value):,}")
    return typographic(f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}")


def format_seconds(seconds: float | None) -> str:
    """Write a time of `seconds` in the units that one would say: 4.21 s, 3 min 05 s, 2 h 14 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def excerpt(text: object, characters: int) -> str:
    """Cut text to a number of characters and say how many more there were."""
    whole = str(text)
    left = len(whole) - characters
    return whole if left <= 0 else f"{whole[:characters]} … ({left:,} more characters)"


def breakable(name: str) -> Markup:
    """Let a long snake_case name break after its underscores."""
    return Markup("_<wbr>").join(str(name).split("_"))  # join escapes the parts


def _total(account: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in account) for name in _COUNTS}


def _csp_hash(style: object) -> str:
    """Name a style sheet in a Content-Security-Policy, so that the page may use this one and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()}'"


def _template_text() -> str:
    return resources.files("dpo_ray.observe").joinpath(_TEMPLATE).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "seconds": format_seconds,
        "excerpt": excerpt,
        "csp_hash": _csp_hash,
        "breakable": breakable,
    }
    return environment
