"""The report's section on the reference model: what computed its log-probs and how fast, and how the audit ended.

It also lists the preference groups whose log-probs could not be computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .audit_plots import drift_plot, pair_error_plot
from .page import format_share

WORDS = {"within": "within", "over": "over", "too few": "too few to tell", "not judged": "not judged"}


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Counts of the stage `reference`.

    sequences: sequences (prompt with completion) whose log-probs were computed.
    found: sequences whose log-probs were already stored.
    tokens: tokens of the computed sequences; a prompt counts once for each sequence.
    cached_tokens: tokens of the computed sequences that were read from the prompt cache.
    tokens_per_second: speed of one engine.
    rescored: sequences that were computed again without the cache.
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
class UnscoredRow:
    """One reason why the log-probs of some preference groups could not be computed, with details of a few groups."""

    reason: str
    meaning: str
    groups: int
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Check:
    """One statistic of the audit and its limit. `verdict` is a key of WORDS."""

    name: str
    value: float
    limit: float | None
    verdict: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class ReferencePage:
    """Everything that the section on the reference model shows.

    note: why another engine than the recipe's engine computed the log-probs; empty if it was the recipe's engine.
    measured: the audit's counts, `worst_groups`, `drift_histogram` and `pair_errors`; empty if there was no audit.
    audit_note: why there was no audit, or what followed from its result.
    """

    scoring: Scoring | None = None
    note: str = ""
    unscored: Sequence[UnscoredRow] = ()
    checks: Sequence[Check] = ()
    passed: bool = False
    measured: Mapping[str, Any] = field(default_factory=dict)
    audit_note: str = ""


def reference_section_values(page: ReferencePage) -> dict[str, Any]:
    """Return the values for the template of the section on the reference model."""
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
