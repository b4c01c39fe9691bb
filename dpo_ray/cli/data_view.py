"""The output of `dpo-ray inspect data`: the data report for a terminal, or as JSON for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpo_ray.observe.text import harmless
from dpo_ray.report.data_page import (
    EXAMPLE_CHARACTERS,
    DataPage,
    LeftOut,
    Measured,
    RenderedCompletion,
    RenderedSample,
    RowCounts,
    TextPiece,
)
from dpo_ray.report.data_words import bias_by_source_words, bias_words, label_words, sharing_words
from dpo_ray.report.histograms import Counted
from dpo_ray.report.page import excerpt, format_number, format_share

HISTOGRAM_COLUMNS = 24
_BARS = " ▁▂▃▄▅▆▇█"
# Both foreground and background are set, so that the text is readable on dark and on light terminals.
_SHADES = {
    "chosen": ("black on green", "black on bright_green"),
    "rejected": ("black on yellow", "black on bright_yellow"),
}
_BOUNDARY = "│"  # between tokens if there are no colours


def figures(page: DataPage, place: str) -> dict[str, Any]:
    """Return the data report as values for JSON; `place` is the path of the web page."""
    return {
        "data_page": place,
        "splits": [dataclasses.asdict(row) for row in page.splits],
        "sources": [dataclasses.asdict(row) for row in page.sources],
        "reasons": [dataclasses.asdict(row) for row in page.reasons],
        "statistics": [
            {"split": m.split, "source": m.source or None, **_with_text_keys(m.summary)} for m in page.measured
        ],
        "samples": [dataclasses.asdict(sample) for sample in page.samples],
    }


def print_account(page: DataPage, name: str, place: str, console: Console) -> None:
    """Print the data report. Control characters in text from the data are replaced."""
    console.print(_rows_table(page, name))
    if page.unaccounted:
        console.print(Text(f"{page.unaccounted:,} rows are not accounted for", style="bold red"))
    for split in page.splits:
        console.print(_limit_line(split, page.max_quarantined_fraction))
    if page.reasons:
        console.print()
        console.print(_reasons_table(page.reasons))
    if page.measured:
        console.print()
        console.print(_lengths_table(page.measured))
    if (training := page.training) is not None:
        summary = (
            (
                "length bias",
                f"{bias_words(training['length_bias'])} {harmless(bias_by_source_words(page.training_biases))}",
            ),
            ("labels", label_words(training["probabilities"])),
            ("shared prompts", sharing_words(training["tokens"])),
        )
        console.print()
        for title, words in summary:
            if words:
                console.print(Text.assemble((f"{title}: ", "bold"), words))
    for i, sample in enumerate(page.samples):
        console.print()
        console.print(_sample(sample, i + 1, coloured=console.is_terminal and not console.no_color))
    console.print()
    console.print(Text.assemble(("the same as a web page: ", "bold"), harmless(place)), soft_wrap=True)


def text_histogram(counted: Counted, longest: int) -> str:
    """Draw a histogram from 0 to `longest` as one line of text. A bin with few values is still drawn visibly."""
    counts = counted.within(np.linspace(-0.5, longest + 0.5, HISTOGRAM_COLUMNS + 1))
    top = counts.max(initial=0.0)
    if not top:
        return ""
    heights = np.ceil(counts / top * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[h] for h in heights)


def _rows_table(page: DataPage, name: str) -> Table:
    table = Table(title=Text(f"{harmless(name)}: rows by source"), title_justify="left")
    for title in ("source", "split"):
        table.add_column(title, overflow="fold")
    for title in ("rows in", "admitted", "unsound", "by rules", "duplicates"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in page.sources:
        table.add_row(Text(harmless(row.source)), row.split, *_counts(row))
    if len(page.sources) > 1:
        table.add_section()
        for row in page.splits:
            table.add_row("all", row.split, *_counts(row), style="bold")
    return table


def _counts(row: RowCounts) -> list[Text]:
    counts = [f"{n:,}" for n in (row.rows_in, row.admitted, row.faults, row.rules, row.duplicates)]
    return [Text(text, style="red" if i == 2 and row.faults else "") for i, text in enumerate(counts)]


def _limit_line(split: RowCounts, limit: float) -> Text:
    over = split.faults > limit * split.rows_in
    share = f" ({format_share(split.faults, split.rows_in)})" if split.faults else ""
    line = f"{split.split}: {split.faults:,} of {split.rows_in:,} rows are unsound{share}; at most {100 * limit:g} % are allowed"
    return Text(f"{line}: over the limit" if over else line, style="bold red" if over else "")


def _reasons_table(reasons: Sequence[LeftOut]) -> Table:
    table = Table(title="rows that were left out, and why", title_justify="left", show_lines=True)
    for title in ("reason", "kind"):
        table.add_column(title, no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("meaning and examples", overflow="fold", ratio=1)
    for row in sorted(reasons, key=lambda r: r.kind):
        lines = [Text(row.meaning)]
        for example in row.examples:
            texts = [harmless(excerpt(text, EXAMPLE_CHARACTERS)) for text in (example.detail, example.text) if text]
            line = Text.assemble((f"{harmless(example.where)}: ", "cyan"), "; ".join(texts))
            lines.append(line)
        kind = Text("unsound", style="red") if row.kind == "fault" else Text("rule", style="magenta")
        table.add_row(row.reason, kind, f"{row.rows:,}", Group(*lines))
    return table


def _lengths_table(measured: Sequence[Measured]) -> Table:
    table = Table(title="lengths in tokens", title_justify="left")
    for title in ("source", "split", "of"):
        table.add_column(title, overflow="fold")
    for title in ("count", "5 %", "median", "95 %", "longest"):
        table.add_column(title, justify="right", no_wrap=True)
    drawn = ("prompt", "chosen", "rejected", "completion")
    longest = max(part["p95"] for m in measured for name in drawn if (part := m.summary["lengths"][name]))
    table.add_column(f"0 … {longest:,}", no_wrap=True, min_width=HISTOGRAM_COLUMNS)
    for m in measured:
        if not m.source and sum(other.split == m.split for other in measured) == 2:
            continue  # with a single source, the row "all" would only repeat it
        names = ("prompt", "chosen", "rejected") if m.summary["lengths"]["chosen"] else ("prompt", "completion")
        for i, name in enumerate(names):
            if not (part := m.summary["lengths"][name]):
                continue
            values = (part["count"], part["p5"], part["p50"], part["p95"], part["max"])
            colour = {"chosen": "green", "rejected": "dark_orange"}.get(name, "")
            whose = (Text(harmless(m.source or "all")), m.split) if i == 0 else ("", "")
            bars = Text(text_histogram(m.counted[name], int(longest)), style=colour)
            table.add_row(*whose, name, *(format_number(v) for v in values), bars, end_section=i == len(names) - 1)
    return table


def _sample(sample: RenderedSample, number: int, *, coloured: bool) -> Group:
    note = f", {sample.note}" if sample.note else ""
    title = f"sample {number}: {harmless(sample.source)}, {sample.split}{note}"
    prompt = Text()
    if sample.hidden_tokens:
        prompt.append(f"… {sample.hidden_tokens:,} tokens before …\n", style="italic dim")
    for piece in sample.prompt:
        prompt.append(_shown(piece), style="dim")
    parts: list[Any] = [
        Rule(Text(title, style="bold"), align="left", characters="─"),
        Text(f"prompt, {sample.prompt_tokens:,} tokens, not trained on", style="bold"),
        Padding(prompt, (0, 0, 0, 2), expand=False),
    ]
    for completion in sample.completions:
        cut = "" if completion.ended else ", cut: no end-of-turn token"
        parts.append(Text(f"{completion.label}, {completion.tokens:,} tokens, trained on{cut}", style="bold"))
        parts.append(Padding(_trained(completion, coloured=coloured), (0, 0, 0, 2), expand=False))
    return Group(*parts)


def _trained(completion: RenderedCompletion, *, coloured: bool) -> Text:
    text, shades = Text(), _SHADES[completion.role]
    for pieces in (completion.pieces, completion.last_pieces):
        for i, piece in enumerate(pieces):
            if not coloured and i:
                text.append(_BOUNDARY)
            style = f"{shades[i % 2]}{' bold' if piece.special else ''}" if coloured else ""
            text.append(_shown(piece), style=style)
        if completion.hidden_tokens and pieces is completion.pieces:
            text.append(f" … {completion.hidden_tokens:,} more … ", style="italic dim")
    return text


def _shown(piece: TextPiece) -> str:
    text = "\n".join(harmless(line) for line in piece.text.replace("\n", "⏎\n").split("\n"))
    return f"⟦{text}⟧" if piece.special else text


def _with_text_keys(summary: Any) -> Any:
    if isinstance(summary, dict):
        return {str(key): _with_text_keys(value) for key, value in summary.items()}
    return summary
