"""What a person reads while a stage runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpo_ray.observe.progress import LOG_EVERY_SECONDS, Bar, Reporter
from dpo_ray.observe.text import duration


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def log() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


def test_a_log_has_a_line_every_few_seconds_with_rate_time_left_and_note() -> None:
    (console, text), clock = log(), Clock()
    bar = Bar(console, None, "train", "steps", 1000, clock)
    for _ in range(100):
        clock.now += 0.125
        bar.advance(1, "loss 0.6")
    lines = text.getvalue().splitlines()
    assert 1 <= len(lines) <= 100 * 0.125 / LOG_EVERY_SECONDS
    assert lines[0] == "train: 40/1,000 steps, 8.0 steps/s, 2 min 00 s left; loss 0.6"


def test_steps_of_an_earlier_attempt_do_not_count_towards_rate_and_time_left() -> None:
    (console, text), clock = log(), Clock()
    bar = Bar(console, None, "train", "steps", 1000, clock)
    clock.now += 60
    bar.begin_at(900)
    clock.now += 10
    bar.advance(5)
    assert "905/1,000 steps, 2.0 s each, 3 min 10 s left" in text.getvalue()
    clock.now += 190
    bar.advance(95)
    bar.close()
    assert text.getvalue().splitlines()[-1] == "train: 1,000 steps (900 of them earlier) in 3 min 20 s, 2.0 s each"


def test_without_a_total_there_is_no_time_left() -> None:
    (console, text), clock = log(), Clock()
    bar = Bar(console, None, "prepare", "groups", None, clock)
    clock.now += 10
    bar.advance(5000, "what [brackets] say")
    assert text.getvalue() == "prepare: 5,000 groups, 500.0 groups/s; what [brackets] say\n"


def test_a_stage_that_fails_has_no_closing_line() -> None:
    console, text = log()

    def fail() -> None:
        with Reporter(console).stage("train", "steps", 3) as bar:
            bar.advance(1)
            raise RuntimeError("a worker died")

    with pytest.raises(RuntimeError):
        fail()
    assert text.getvalue() == "train: started\n"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_figures_that_are_not_cut_and_ends_with_one_line(width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None)
    with Reporter(console).stage("prepare + reference", "groups", 20_000) as bar:
        bar.advance(10_000, "123,456 tokens scored, 0 known, 12,345 tokens/s an engine")
        bar._live.refresh()  # type: ignore[union-attr]
    shown = text.getvalue()
    assert "10,000/20,000 groups" in shown
    assert "123,456 tokens scored" in shown
    closing = shown.splitlines()[-1]
    assert "prepare + reference: 10,000 groups in" in closing


def test_a_stage_beside_another_leaves_it_the_live_bar_and_says_lines() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    with Reporter(console).stage("reference", "groups", 10, beside=True) as bar:
        bar.advance(4, "scored")
        bar.advance(6, "all")
    first, last = text.getvalue().splitlines()
    assert first == "reference: started"
    assert last.startswith("reference: 10 groups in ")
    assert last.endswith("; all")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (75, "75 s"), (750, "12 min 30 s"), (7199.9, "2 h 00 min"), (11_100, "3 h 05 min")],
)  # fmt: skip
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
