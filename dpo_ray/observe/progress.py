"""Progress of a stage, shown as a live bar on a terminal, or as plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from dpo_ray.observe.metrics import STAGE_ACTIVE
from dpo_ray.observe.recorder import record
from dpo_ray.observe.text import duration

LOG_EVERY_SECONDS = 5.0
BESIDE_EVERY_SECONDS = 60.0  # for a stage whose lines appear above the live bar of another stage

Clock = Callable[[], float]


class Bar:
    """The progress of one running stage: units done and in total, rate, remaining time, and a note with metrics."""

    def __init__(
        self,
        console: Console,
        live: Progress | None,
        title: str,
        unit: str,
        total: int | None,
        clock: Clock = time.monotonic,
        every_seconds: float = LOG_EVERY_SECONDS,
    ) -> None:
        self._console, self._live, self._title, self._unit, self._total = console, live, title, unit, total
        self._clock, self._every_seconds = clock, every_seconds
        self._began = self._said = clock()
        self._done, self._note, self._before = 0.0, "", 0.0
        self._task: TaskID | None = live.add_task(title, total=total, figures="", note="") if live else None
        self._show()

    def begin_at(self, done: float) -> None:
        """Set how many units a previous attempt has done. They count as progress, but not in the rate."""
        self._done = self._before = done
        self._began = self._clock()
        self._show()

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more units as done, and show `note` after the numbers; if empty, keep the last note."""
        self._done += amount
        self._note = note or self._note
        self._show()

    def close(self) -> None:
        """Print the last line of the stage, with the total amount and the time, which stays visible."""
        earlier = f" ({self._before:,.0f} of them earlier)" if self._before else ""
        rate = f", {self._rate()}" if self._done > self._before else ""
        note = f"; {self._note}" if self._note else ""
        took = duration(self._clock() - self._began)
        self._line(f"{self._done:,.0f} {self._unit}{earlier} in {took}{rate}{note}", bold=True)

    def say(self, text: str) -> None:
        """Print one line of text under the stage's title, without a change of the progress."""
        self._line(text)

    def _rate(self) -> str:
        done, seconds = self._done - self._before, max(1e-9, self._clock() - self._began)
        if 0 < done < seconds:
            return f"{seconds / done:,.1f} s each"
        return f"{done / seconds:,.1f} {self._unit}/s"

    def _left(self) -> str:
        if not self._total or self._done <= self._before:
            return ""
        seconds = (self._total - self._done) * (self._clock() - self._began) / (self._done - self._before)
        return f"{duration(max(0.0, seconds))} left"

    def _show(self) -> None:
        total = f"/{self._total:,}" if self._total else ""
        figures = ", ".join(f for f in (f"{self._done:,.0f}{total} {self._unit}", self._rate(), self._left()) if f)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, figures=figures, note=escape(self._note))
        elif self._clock() - self._said >= self._every_seconds:
            self._said = self._clock()
            self._line(f"{figures}; {self._note}" if self._note else figures)

    def _line(self, text: str, *, bold: bool = False) -> None:
        title = f"[bold]{self._title}[/bold]" if bold else self._title
        self._console.print(f"{title}: {escape(text)}", highlight=False, soft_wrap=True)


class Reporter:
    """Prints the progress of a run to standard error, so that standard output contains results only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """Print one line, which may contain rich markup."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, unit: str, total: int | None = None, *, beside: bool = False) -> Iterator[Bar]:
        """Show the progress of a stage while this context is active. If the stage does not fail, print a last line.

        Args:
            unit: what is counted, such as `groups`.
            total: number of units; None if it is not known.
            beside: print lines instead of a live bar, because another stage runs at the same time and uses the bar.
        """
        name = title.rpartition(": ")[2]  # without the number of the round, so that there are few names
        record(STAGE_ACTIVE, 1, stage=name)
        try:
            with self._shown(title, unit, total, beside=beside) as bar:
                yield bar
        finally:
            record(STAGE_ACTIVE, 0, stage=name)

    @contextmanager
    def _shown(self, title: str, unit: str, total: int | None, *, beside: bool) -> Iterator[Bar]:
        if beside or not self.console.is_terminal:
            self.console.print(f"{title}: started", highlight=False, soft_wrap=True)
            every_seconds = BESIDE_EVERY_SECONDS if self.console.is_terminal else LOG_EVERY_SECONDS
            bar = Bar(self.console, None, title, unit, total, every_seconds=every_seconds)
            yield bar
            bar.close()
            return
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TimeElapsedColumn(),
            # The note is on a separate line: next to the figures it would be cut off on a narrow terminal.
            TextColumn(
                "{task.fields[figures]}\n{task.fields[note]}",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as live:
            bar = Bar(self.console, live, title, unit, total)
            yield bar
        bar.close()
