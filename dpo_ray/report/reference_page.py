"""The account of the reference for a reader: who scored it and how fast, what was left out, and the audit's findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .audit_plots import drift_plot, pair_error_plot
from .page import format_share

WORDS = {"within": "within", "over": "over", "too few": "too few to tell", "not judged": "not judged"}


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Count what the stage `reference` did.

    tokens: of prompts and completions that were scored, each prompt once a sequence; cached_tokens: of these, read from a
    prompt's cache; tokens_per_second: of one engine; rescored: sequences sent again without the cache.
    """

    engine: str  # and its version
    numerics: str  # dtype, device, parallelism
    engines: int
    sequences: int
    found: int
    tokens: int
    cached_tokens: int
    tokens_per_second: float
    rescored: int


@dataclass(frozen=True)
class Unscored:
    """Hold one reason for which groups have no log-probs, and details of some."""

    reason: str
    meaning: str
    groups: int
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Check:
    """Hold one statistic of the audit; `verdict` is a key of WORDS."""

    name: str
    value: float
    limit: float | None
    verdict: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class ReferencePage:
    """Hold the section on the reference.

    note: what happened to the reference that the recipe names, if it is not the one in use.
    measured: the audit's counts, `worst_groups`, `drift_histogram` and `pair_errors`; empty where there was none.
    audit_note: why there was none, or what followed from it.
    """

    scoring: Scoring | None = None
    note: str = ""
    unscored: Sequence[Unscored] = ()
    checks: Sequence[Check] = ()
    passed: bool = False
    measured: Mapping[str, Any] = field(default_factory=dict)
    audit_note: str = ""


def reference_section_values(page: ReferencePage) -> dict[str, Any]:
    """Return what the template of the section shows."""
    m = page.measured
    return {
        "reference": page,
        "reference_tiles": _tiles(page.scoring) if page.scoring else [],
        "audit_plots": [
            drift_plot(m.get("drift_histogram", {})),
            pair_error_plot(m.get("pair_errors", {}), m.get("pairs", 0)),
        ],
        "verdict_words": WORDS,
    }


def _tiles(s: Scoring) -> list[tuple[str, str | float, str]]:
    engines = f"{s.engines} engine{'s' if s.engines > 1 else ''}, " if s.engines else ""
    cached = f"{format_share(s.cached_tokens, s.tokens)} from the prompt cache" if s.tokens else ""
    again = f"{s.rescored:,} sent again without the cache" if s.rescored else ""
    return [
        ("scored by", s.engine, engines + s.numerics),
        ("sequences scored", s.sequences, again),
        ("already known", s.found, "read from the reference store"),
        ("tokens scored", s.tokens, cached),
        ("tokens / s of an engine", s.tokens_per_second if s.tokens else "–", ""),
    ]
