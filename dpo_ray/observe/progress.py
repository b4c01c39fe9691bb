"""Progress of a stage: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_EVERY_SECONDS = 5.0


class Bar:
    """One stage under way: how much is done of how much, at what rate, with what figures."""

    def __init__(self, console: Console, live: Progress | None, title: str, unit: str, total: int | None) -> None:
        self._console, self._live, self._title, self._unit, self._total = console, live, title, unit, total
        self._began = self._said = time.monotonic()
        self._done, self._note, self._before = 0.0, "", 0.0
        self._task: TaskID | None = live.add_task(title, total=total, unit=unit, note="", rate="") if live else None

    def begin_at(self, done: float) -> None:
        """Say what an earlier attempt has done: it counts as progress, not towards the rate."""
        self._done = self._before = done
        self._began = time.monotonic()
        self._show()

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown behind them."""
        self._done += amount
        self._note = note or self._note
        self._show()

    def close(self) -> None:
        """Print the closing line: it stays in the log."""
        seconds = time.monotonic() - self._began
        self._console.print(
            f"[bold]{self._title}[/bold]: {self._done:,.0f} {self._unit} in {seconds:.1f} s ({self._rate()})",
            highlight=False,
            soft_wrap=True,
        )

    def say(self, text: str) -> None:
        """Print a line that is not progress."""
        self._console.print(f"{self._title}: {text}", highlight=False, soft_wrap=True)

    def _rate(self) -> str:
        return f"{(self._done - self._before) / max(1e-9, time.monotonic() - self._began):,.1f} {self._unit}/s"

    def _show(self) -> None:
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, rate=self._rate(), note=self._note)
        elif time.monotonic() - self._said >= LOG_EVERY_SECONDS:
            self._said = time.monotonic()
            left = ""
            if self._total and self._done > self._before:
                seconds = (self._total - self._done) * (time.monotonic() - self._began) / (self._done - self._before)
                left = f", {max(0.0, seconds):.0f} s left"
            total = f"/{self._total:,}" if self._total else ""
            self._console.print(
                f"{self._title}: {self._done:,.0f}{total} {self._unit}, {self._rate()}{left} {self._note}",
                highlight=False,
                soft_wrap=True,
            )


class Reporter:
    """Where a run says what it does: standard error, so that standard output carries results alone."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, unit: str, total: int | None = None) -> Iterator[Bar]:
        """Show a stage while it runs; its closing line is printed if it ends well."""
        if not self.console.is_terminal:
            self.console.print(f"{title}: started", highlight=False, soft_wrap=True)
            bar = Bar(self.console, None, title, unit, total)
            yield bar
            bar.close()
            return
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as live:
            bar = Bar(self.console, live, title, unit, total)
            yield bar
        bar.close()
