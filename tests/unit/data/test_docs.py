"""docs/data.md lists every reason and every format, with the meanings that the code has."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from dpo_ray.config.sources import RowFormat
from dpo_ray.data.admission import REASONS

PAGE = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")


def test_every_reason_stands_in_the_docs_as_in_the_code():
    listed = [line for line in PAGE.splitlines() if line.startswith(tuple(f"| `{reason}` |" for reason in REASONS))]
    assert listed == [f"| `{code}` | {reason.kind} | {reason.meaning} |" for code, reason in REASONS.items()]


def test_every_format_stands_in_the_docs():
    assert all(f"| `{name}` |" in PAGE for name in get_args(RowFormat) if name != "auto")
