"""The tables that the `store` commands print."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_ray.artifacts.storage import Storage
from dpo_ray.observe.text import harmless, size
from dpo_ray.reference.store.care import Fault, PartitionStats
from dpo_ray.reference.store.gc import Cleared


def print_stats(root: Storage, found: Sequence[PartitionStats], console: Console) -> None:
    """Print a table with a line for each partition of a store, and the totals."""
    table = Table(title=root.uri, title_justify="left", show_footer=len(found) > 1, show_lines=True)
    table.add_column("partition, engine, numerics", "all", overflow="fold")
    for name in ("sequences", "tokens", "segments"):
        table.add_column(name, f"{sum(getattr(p, name) for p in found):,}", justify="right", no_wrap=True)
    table.add_column("size", size(sum(p.bytes for p in found)), justify="right", no_wrap=True)
    table.add_column("used", no_wrap=True)
    for p in found:
        segments = Text(f"{p.segments:,}")
        if p.damaged_segments:
            segments.append(f"\n{p.damaged_segments:,} damaged", style="red")
        used = _ago(p.used_unix_seconds)
        table.add_row(_described(p), f"{p.sequences:,}", f"{p.tokens:,}", segments, size(p.bytes), used)
    console.print(table)


def print_faults(root: Storage, faults: Sequence[Fault], console: Console) -> None:
    """Print a table with a line for each fault in a store. File names are relative to the store."""
    table = Table(title=root.uri, title_justify="left", show_lines=True)
    table.add_column("file", overflow="fold", min_width=40)
    table.add_column("what is wrong", overflow="fold")
    for fault in faults:
        table.add_row(*(Text(harmless(text)) for text in (fault.where.removeprefix(f"{root.uri}/"), fault.what)))
    console.print(table)


def print_cleared(done: Sequence[Cleared], dry_run: bool, console: Console) -> None:
    """Print a table with a line for each change that `store gc` has made, or in a dry run would make."""
    table = Table(title="dry run: this would be done" if dry_run else "", title_justify="left")
    table.add_column("partition", no_wrap=True)
    table.add_column("what")
    for name in ("files", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for cleared in done:
        table.add_row(cleared.partition, cleared.action, f"{cleared.files:,}", size(cleared.bytes), cleared.why)
    console.print(table)


def _described(p: PartitionStats) -> Text:
    others = (f"{name} {value}" for name, value in p.numerics.items() if name not in ("engine", "version"))
    engine = f"{p.numerics.get('engine', 'unknown engine')} {p.numerics.get('version', '')}"
    return Text("\n".join(harmless(line) for line in (p.partition, engine, ", ".join(others)) if line))


def _ago(unix_seconds: float | None) -> str:
    if unix_seconds is None:
        return "never"
    hours = (time.time() - unix_seconds) / 3600
    if hours < 2:
        return "just now"
    return f"{hours:.0f} hours ago" if hours < 48 else f"{hours / 24:.0f} days ago"
