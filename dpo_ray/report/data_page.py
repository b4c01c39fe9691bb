"""The data page: which rows were used, which rows were left out and why, their lengths, and what the model sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup, escape

from .data_words import bias_by_source_words, bias_words, label_words
from .histograms import Counted, counted_plot
from .page import format_number, format_share, render_page
from .plots import Plot, typographic

MAX_PLOTTED_SOURCES = 6
EXAMPLE_CHARACTERS = 240
CONTENTS = (
    ("data-rows", "What went in"),
    ("data-left-out", "What was left out"),
    ("data-lengths", "Lengths"),
    ("data-bias", "Length bias"),
    ("data-sharing", "Shared prompts"),
    ("data-samples", "What the model sees"),
)
_LENGTHS_CAPTION = "Tokens after the chat template; a completion counts its end-of-turn token; dashed: mean."


@dataclass(frozen=True)
class RowCounts:
    """How many rows were used, and how many were left out, in one source, or in a whole split if `source` is empty."""

    split: str
    source: str
    rows_in: int
    admitted: int
    faults: int
    rules: int
    duplicates: int
    near_duplicates: int = 0  # included in duplicates

    @property
    def unaccounted(self) -> int:
        """Return how many rows that were read are in none of the counts; 0 if every row is counted once."""
        return self.rows_in - self.admitted - self.faults - self.rules - self.duplicates


@dataclass(frozen=True)
class Example:
    """One row that was left out: where it is, what exactly is wrong with it, and the beginning of its text."""

    where: str
    detail: str
    text: str


@dataclass(frozen=True)
class LeftOut:
    """One reason why rows were left out, with their number in total (`rows`) and for each source (`sources`)."""

    reason: str
    kind: Literal["fault", "rule"]
    meaning: str
    rows: int
    sources: Mapping[str, int]
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Measured:
    """The statistics of one source, or of a whole split if `source` is empty; `counted` holds histograms to draw."""

    split: str
    source: str
    summary: Mapping[str, Any]
    counted: Mapping[str, Counted] = field(default_factory=dict)


@dataclass(frozen=True)
class TextPiece:
    """The text of one token, or of several tokens that only together make up a character."""

    text: str
    tokens: int = 1
    special: bool = False


@dataclass(frozen=True)
class RenderedCompletion:
    """One completion as the model sees it. If it is long, `hidden_tokens` in its middle are not shown."""

    label: str
    role: Literal["chosen", "rejected"]
    tokens: int
    pieces: Sequence[TextPiece]
    hidden_tokens: int
    last_pieces: Sequence[TextPiece]
    ended: bool  # with an end-of-turn token


@dataclass(frozen=True)
class RenderedSample:
    """One preference group as the model sees it. If its prompt is long, the first `hidden_tokens` are not shown."""

    split: str
    source: str
    note: str
    prompt_tokens: int
    hidden_tokens: int
    prompt: Sequence[TextPiece]
    completions: Sequence[RenderedCompletion]


@dataclass(frozen=True, kw_only=True)
class DataPage:
    """Everything that the data page shows. All text may come from untrusted data, so it is escaped.

    sources, splits: the row counts of each source, and of each split.
    measured: statistics of each whole split, followed by the statistics of its sources.
    max_quarantined_fraction, max_length_tokens: the limits in the recipe.
    samples_note: why there are no samples.
    """

    sources: Sequence[RowCounts] = ()
    splits: Sequence[RowCounts] = ()
    reasons: Sequence[LeftOut] = ()
    measured: Sequence[Measured] = ()
    samples: Sequence[RenderedSample] = ()
    samples_note: str = ""
    max_quarantined_fraction: float = 0.01
    max_length_tokens: int | None = None

    @property
    def unaccounted(self) -> int:
        """Return how many rows are missing from the counts or counted twice, added up over all sources."""
        return sum(abs(row.unaccounted) for row in self.sources)

    @property
    def training(self) -> Mapping[str, Any] | None:
        """Return the statistics of all training data, or None if there are none."""
        return next((m.summary for m in self.measured if m.split == "train" and not m.source), None)

    @property
    def training_biases(self) -> list[tuple[str, Mapping[str, float | None] | None]]:
        """List the name and the length bias of each source of the training data."""
        return [(m.source, m.summary["length_bias"]) for m in self.measured if m.split == "train" and m.source]


def render_data_page(page: DataPage, *, name: str, created: str, what: str) -> str:
    """Return the data section as an HTML page of its own. The same data gives the same bytes."""
    return render_page(
        "data.html.jinja", kind="data", name=name, created=created, what=what, **data_section_values(page)
    )


def data_section_values(page: DataPage) -> dict[str, Any]:
    """Return the values for the template of the data section."""
    return {
        "page": page,
        "data_contents": CONTENTS,
        "data_tiles": _tiles(page),
        "length_plots": _length_plots(page.measured),
        "difference_plot": _difference_plot(page.measured),
        "example_characters": EXAMPLE_CHARACTERS,
        "bias_words": bias_words,
        "bias_by_source": bias_by_source_words(page.training_biases),
        "token_spans": token_spans,
        "strip": _strip,
        "box": _box,
        "label_words": label_words,
    }


def token_spans(pieces: Sequence[TextPiece]) -> Markup:
    """Return the HTML of tokens. Special tokens are in boxes, and a line break has a visible sign before it."""
    spans = []
    for piece in pieces:
        if piece.special:
            spans.append(Markup('<span class="special">{}</span>').format(piece.text))
            continue
        text = escape(piece.text).replace("\n", Markup('<i class="break">⏎</i>\n'))
        spans.append(Markup("<span>{}</span>").format(text))
    return Markup("").join(spans)


def _tiles(page: DataPage) -> list[tuple[str, str, str]]:
    """List the most important numbers about the data as (label, value, note)."""
    if not page.splits:
        return []
    rows, admitted, faults, rules, duplicates = (
        sum(getattr(split, name) for split in page.splits)
        for name in ("rows_in", "admitted", "faults", "rules", "duplicates")
    )
    tiles = [
        ("admitted", format_share(admitted, rows), f"{admitted:,} of {rows:,} rows"),
        (
            "unsound",
            format_share(faults, rows),
            f"{faults:,} rows; at most {100 * page.max_quarantined_fraction:g} % allowed",
        ),
        ("left out by rules", format_share(rules, rows), f"{rules:,} rows"),
        ("duplicates", format_share(duplicates, rows), f"{duplicates:,} rows"),
    ]
    if (training := page.training) is None:
        return tiles
    if bias := training["length_bias"]:
        r = "–" if bias["correlation"] is None else typographic(f"{bias['correlation']:+.3f}")
        tiles.append(("length bias r", r, f"chosen longer in {100 * bias['chosen_longer']:.0f} % of pairs"))
    tokens = training["tokens"]
    tiles.append(
        (
            "saved by shared prompts",
            format_share(tokens["unshared"] - tokens["shared"], tokens["unshared"]),
            f"{format_number(tokens['shared'])} tokens for {format_number(tokens['unshared'])}",
        )
    )
    return tiles


def _length_plots(measured: Sequence[Measured]) -> list[Plot]:
    """Draw histograms of the lengths of all training data and, if it has several sources, of the largest sources."""
    whole = [m for m in measured if m.split == "train" and not m.source]
    sources = [m for m in measured if m.split == "train" and m.source]
    title = "Token lengths, all training data" if len(sources) > 1 else "Token lengths"
    plots = [_length_plot("lengths", title, whole[0].counted if whole else {})]
    if len(sources) > 1:
        largest = sorted(sources, key=lambda m: -m.summary["groups"])[:MAX_PLOTTED_SOURCES]
        for i, source in enumerate(s for s in sources if s in largest):
            plots.append(_length_plot(f"lengths-{i + 1}", source.source, source.counted))
    return plots


def _length_plot(key: str, title: str, counted: Mapping[str, Counted]) -> Plot:
    has_pairs = "chosen" in counted and counted["chosen"].total
    names = ("prompt", "chosen", "rejected") if has_pairs else ("prompt", "completion")
    parts = {name: counted[name] for name in names if name in counted}
    return counted_plot(key, title, _LENGTHS_CAPTION, "tokens", parts)


def _difference_plot(measured: Sequence[Measured]) -> Plot:
    whole = [m for m in measured if m.split == "train" and not m.source]
    parts = {"train": whole[0].counted["difference"]} if whole and "difference" in whole[0].counted else {}
    caption = "Of every training pair; right of 0, chosen is the longer one; dashed: mean."
    return counted_plot("length-difference", "Chosen minus rejected", caption, "tokens", parts)


def _strip(row: RowCounts) -> Markup:
    """Draw a strip whose parts are the shares of a source's rows: used, duplicates, left out by rules, invalid.

    A share above 0 always has a visible width.
    """
    parts = (("train", row.admitted), ("prompt", row.duplicates), ("eval", row.rules), ("rejected", row.faults))
    widths = [(role, max(1.2, 100 * count / max(1, row.rows_in))) for role, count in parts if count]
    scale, x, rects = 100 / max(1e-9, sum(w for _, w in widths)), 0.0, []
    for role, width in widths:
        rects.append(
            Markup('<rect class="fill-{}" x="{:.2f}" width="{:.2f}" height="8"/>').format(role, x, width * scale)
        )
        x += width * scale
    return Markup(
        '<svg class="strip" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(Markup("").join(rects))


def _box(described: Mapping[str, float], role: str, longest: float) -> Markup:
    """Draw a box plot of lengths on an axis from 0 to `longest` tokens.

    The line is from p5 to p95, the box from p25 to p75, and the gap in the box is the median.
    """
    p5, p25, p50, p75, p95 = (100 * described[p] / max(1, longest) for p in ("p5", "p25", "p50", "p75", "p95"))
    return Markup(
        '<svg class="box" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="fill-{0}" x="{1:.2f}" y="4.3" width="{2:.2f}" height="1.4"/>'
        '<rect class="fill-{0}" x="{3:.2f}" y="1" width="{4:.2f}" height="8"/>'
        '<rect class="fill-card" x="{5:.2f}" y="1" width="0.9" height="8"/></svg>'
    ).format(role, p5, max(0.6, p95 - p5), p25, max(1.2, p75 - p25), p50 - 0.45)
