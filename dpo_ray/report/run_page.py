"""The report of a run: one HTML file without scripts and external files, so it can be read, printed or sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .data_page import DataPage, data_section_values
from .histograms import heldout_plots
from .page import render_page
from .plots import SMOOTHED_FROM_POINTS, smoothing_window, training_plots
from .reference_page import ReferencePage, reference_section_values

SAMPLE_CHARACTERS = 1_200
MAX_SAMPLES = 40


@dataclass(frozen=True)
class Tile:
    """One value at the top of the report. A number is formatted; a string is shown unchanged."""

    label: str
    value: str | float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a run's report shows. Empty fields are shown as not measured.

    All text may come from untrusted data. It is escaped, and samples and examples are cut to a length that fits a page.

    name, created, what: name of the run, its time (ISO 8601), and one sentence about it.
    headline: the values at the top.
    comparison: rows of (measure, value of the reference model, value of the policy).
    train_metrics, eval_metrics: one row for each measured step, with `step` and metrics by TRL's names; a row may have
    only some metrics.
    best_step: the step whose weights were kept, if the recipe sets train.best.
    heldout_rewards: `chosen` and `rejected` rewards.
    kl_per_sample: the KL estimate of each sampled completion, in nats.
    data: the section on the data.
    reference: the section on the reference model and its audit.
    samples: rows of prompt, reference, policy and, if judged, reference_score, policy_score.
    stages: rows of stage, key, state and, if known, seconds, rows, note.
    """

    name: str
    created: str
    what: str
    headline: Sequence[Tile] = ()
    comparison: Sequence[tuple[str, str, str]] = ()
    train_metrics: Sequence[Mapping[str, float]] = ()
    eval_metrics: Sequence[Mapping[str, float]] = ()
    best_step: int | None = None
    heldout_rewards: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kl_per_sample: Sequence[float] = ()
    data: DataPage = field(default_factory=DataPage)
    reference: ReferencePage = field(default_factory=ReferencePage)
    samples: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    recipe_yaml: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)


def render_report(data: ReportData) -> str:
    """Return the report as HTML. The same data gives the same bytes.

    Raises KeyError or jinja2.UndefinedError if a row of `data` has not all required fields.
    """
    steps = len(data.train_metrics)
    return render_page(
        "report.html.jinja",
        kind="run report",
        name=data.name,
        created=data.created,
        what=data.what,
        data=data,
        headline=[(tile.label, tile.value, tile.note) for tile in data.headline],
        training=training_plots(data.train_metrics, data.eval_metrics, data.best_step),
        heldout=heldout_plots(data.heldout_rewards, data.kl_per_sample),
        window=smoothing_window(steps) if steps >= SMOOTHED_FROM_POINTS else 0,
        samples=data.samples[:MAX_SAMPLES],
        sample_characters=SAMPLE_CHARACTERS,
        **data_section_values(data.data),
        **reference_section_values(data.reference),
    )
