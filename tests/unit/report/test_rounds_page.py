"""The page of rounds stands alone, shows every round's figures, keeps foreign text harmless, and bears rounds in mid-work."""

from __future__ import annotations

import dataclasses
import math
import re

import matplotlib
import pytest

from dpo_ray.report.rounds_page import (
    MAX_SAMPLES,
    SAMPLE_CHARACTERS,
    RoundRow,
    RoundSample,
    RoundsPage,
    cost_words,
    rate_words,
    reward_words,
    rounds_html,
)
from dpo_ray.report.rounds_plots import Point, by_round_plot, frontier_plot, stacked_plot, stage_colours
from tests.helpers.pages import Page
from tests.helpers.rounds import rounds_page

SECTIONS = ["summary", "words", "rounds", "cost", "samples", "recipe"]
PLOTS = [
    "frontier",
    "steps",
    "mean-tokens",
    "distinct-2",
    "entropy",
    "truncated-fraction",
    "time-by-stage",
    "tokens-by-stage",
]
HOSTILE = "<script>alert(1)</script><img src=https://evil.example/x onerror='alert(1)'></p></section>"
EMPTY = RoundsPage(name="empty", created="", what="Nothing ran.")
PAGES = [
    rounds_page(30),
    rounds_page(0),
    rounds_page(0, under_way=True),
    rounds_page(1),
    rounds_page(5, true_reward=False, under_way=True),
    dataclasses.replace(EMPTY, rows=[RoundRow(number=1, state="planned")]),
    EMPTY,
]


@pytest.fixture(scope="module")
def html() -> str:
    return rounds_html(rounds_page(7, under_way=True))


@pytest.mark.parametrize("page", PAGES)
def test_every_section_is_there_and_linked_whatever_is_known_yet(page: RoundsPage) -> None:
    text = rounds_html(page)
    read = Page(text)
    assert re.findall(r"\b(None|nan|inf|[Uu]ndefined)\b", text.split("</head>")[1]) == []
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    assert [a["id"] for tag, a in read.tags if tag == "section"] == SECTIONS
    assert [i.removeprefix("plot-") for i in ids if i.startswith("plot-")] == PLOTS
    inside = {h[1:] for h in read.values("href") if h.startswith("#")}
    assert inside <= set(ids)
    assert [h for h in read.values("href") if h[0] != "#"] == []


def test_figures_that_are_not_finite_are_not_shown_as_numbers() -> None:
    nan = math.nan
    row = RoundRow(
        number=1,
        state="promoted",
        decision="promoted",
        kl=2.0,
        true_reward=nan,
        win_rate_initial=(nan, nan, nan),
        entropy=nan,
    )
    words = Page(rounds_html(dataclasses.replace(EMPTY, rows=[row]))).words()
    assert "nan" not in words
    assert words.count("Left out as not finite: 1.") == 2  # of the frontier and of the entropy


def test_figures_of_the_rounds_are_shown(html: str) -> None:
    words = Page(html).words()
    for expected in (
        "tiny-rounds",
        "The rounds go on: round 8 is judged.",
        "6 of 7",
        "1 rejected, 1 not decided",
        "2,716119 prompts without a pair",  # 7 × 400 − 3 × 28 pairs; 7 × 13 + 28 dropped
        "4,992 judge calls, $0.44",  # 7 × 640 + 512; 7 × 0.0625 + 0.004
        "56.0 % (49.0–62.0)",
        "42.0 % (35.0–48.0)",
        "4rejectedround 3",
        "5promotedround 3",  # not the rejected one
        "8judgedround 7",
        "plain: the win rate is 0.42, not at least 0.5",
        "no_gap: 15",
        "one_completion: 2",
        "120,000 / 900",
        "930,000 / 6,900",
        "< $0.01",
        "plain: what round 5 says.",
        "score 0.125",
        "note: plain",
        "Round 4, rejected: 0.42.",
        "Initial policy: KL 0, true reward -0.4375.",
        "Round 7, promoted: 0.626.",  # distinct bigrams: 0.71 − 7 × 0.012
    ):
        assert expected in words, expected
    before, after = re.search(r"true reward([+−][\d.]+) → ([+−][\d.]+)initial policy → round 7", words).groups()  # type: ignore[union-attr]
    assert before == "−0.438"
    assert f"7promotedround 6 8.164{after}" in words


def test_the_win_rate_stands_in_where_no_true_reward_is_known() -> None:
    words = Page(rounds_html(rounds_page(3, true_reward=False))).words()
    assert "Win rate against KL" in words
    assert "Initial policy: KL 0, win rate 0.5." in words
    assert "rue reward" not in words
    assert "Bars are confidence intervals. Dotted: neither policy is better." in words
    assert "The rounds have ended: plain: all online.rounds=3 rounds have run." in words


def test_a_round_that_is_evaluated_but_not_decided_is_marked_so() -> None:
    row = RoundRow(number=1, state="evaluated", kl=1.5, win_rate_initial=(0.625, 0.5, 0.75))
    html = rounds_html(dataclasses.replace(EMPTY, rows=[row]))
    words = Page(html).words()
    assert "Round 1, undecided: KL 1.5, win rate 0.625." in words
    assert "0 of 00 rejected, 1 not decided" in words
    assert html.count("dot fill-card stroke-prompt") == 1


def test_nothing_is_fetched_or_executed(html: str) -> None:
    page = Page(html)
    fetching = {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    assert not fetching & {tag for tag, _ in page.tags}
    for attribute in ("src", "srcset", "style", "action", "data", "xlink:href"):
        assert page.values(attribute) == []
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert re.search(r"https?://|@import", html) is None
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert re.findall(r"#0000\d\d|stroke=\"#|fill=\"#", html.split("</head>")[1]) == []


def test_foreign_text_is_escaped_everywhere() -> None:
    page = dataclasses.replace(rounds_page(9, text=HOSTILE, under_way=True), created=HOSTILE)
    rows = [dataclasses.replace(r, state=HOSTILE, dropped={HOSTILE: 1}, seconds={HOSTILE: 1.0}) for r in page.rows]
    html = rounds_html(dataclasses.replace(page, rows=rows, stopped=HOSTILE))
    read = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in read.tags}
    in_attributes = 1  # the time's `datetime`
    assert html.count("&lt;script&gt;") == read.words().count("<script>") + in_attributes
    assert not [h for h in read.values("href") if ":" in h]


def test_broken_text_is_made_writable() -> None:
    sample = RoundSample("a\x00b\x1b[31m", ((0, "\ud800", None),))
    html = rounds_html(dataclasses.replace(EMPTY, samples=[sample]))
    assert html.encode("utf-8")
    assert "a␀b␛[31m" in html


def test_long_text_many_samples_and_many_rounds_are_kept_short() -> None:
    long = "x" * 100_000
    sample = RoundSample(long, tuple((n, long, 0.5) for n in range(8)))
    html = rounds_html(dataclasses.replace(EMPTY, samples=[sample] * (MAX_SAMPLES + 2)))
    assert html.count("<article") == MAX_SAMPLES
    assert f"The first {MAX_SAMPLES} of {MAX_SAMPLES + 2}." in html
    assert html.count("2 rounds between") == MAX_SAMPLES
    assert html.count("x" * SAMPLE_CHARACTERS) == 9 * MAX_SAMPLES
    assert "x" * (SAMPLE_CHARACTERS + 1) not in html
    assert len(rounds_html(rounds_page(30)).encode()) < 400_000


def test_all_rounds_of_a_sample_are_shown_once_and_in_order() -> None:
    for count in (1, 5, 6, 20):
        (sample, _) = rounds_page(count).samples
        words = Page(rounds_html(dataclasses.replace(EMPTY, samples=[sample]))).words()
        assert [int(n) for n in re.findall(r"what round (\d+) says", words)] == list(range(count + 1))


def test_same_rounds_give_the_same_page_whatever_matplotlib_is_set_to(html: str) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "svg.hashsalt": "other", "axes.grid": False}):
        assert rounds_html(rounds_page(7, under_way=True)) == html


def test_numbers_stand_at_points_and_are_left_out_only_where_there_is_no_room() -> None:
    apart = [Point(n, "promoted", (n - 40) / 8, (n - 40) / 8) for n in range(41, 46)]
    plot = frontier_plot(apart, "true reward")
    assert "only some" not in plot.caption
    assert re.findall(r">(\d\d)</text>", plot.svg) == ["45", "44", "43", "42", "41"]
    crowd = [Point(n, "rejected", 0.6 + n / 1e6, 0.1) for n in range(50, 90)]
    plot = frontier_plot([*apart, *crowd], "true reward")
    assert "Where points crowd, only some have their number." in plot.caption
    written = re.findall(r">(\d\d)</text>", plot.svg)
    assert written[:6] == ["45", "44", "43", "42", "41", "89"]
    assert len(written) < 45


def test_rejected_points_are_hollow_and_off_the_line() -> None:
    points = [Point(0, "initial", 0, 1.0), Point(1, "promoted", 1, 2.0), Point(2, "rejected", 2, 9.0)]
    plot = by_round_plot("k", "t", "c", "y", points)
    assert plot.legend == (
        ("initial policy", "dot fill-ink"),
        ("promoted", "dot fill-chosen"),
        ("rejected", "dot fill-card stroke-rejected"),
    )
    line = re.search(r'<path d="M ([^"]+)"[^>]*class="stroke-chosen"', plot.svg)
    assert line is not None
    assert line[1].count("L") == 1  # from the initial policy to round 1
    assert 'class="fill-rejected' not in plot.svg


def test_a_stage_has_one_colour_in_all_plots_and_small_ones_share_a_piece() -> None:
    names = ["sample", "judge", "pair", "reference", "schedule", "train", "evaluate"]
    times = {1: dict(zip(names, (60.0, 12.0, 0.5, 20.0, 0.25, 140.0, 33.0), strict=True))}
    tokens = {1: {"sample": 9.0, "train": 8.0}}
    colours = stage_colours(tokens, times)
    assert list(colours) == ["sample", "judge", "reference", "train", "evaluate"]
    legends = [dict(stacked_plot("k", "t", "c", "y", m, colours, str).legend) for m in (times, tokens)]
    assert list(legends[0]) == [*colours, "other stages"]
    assert legends[1] == {s: legends[0][s] for s in ("sample", "train")}
    drawn = stacked_plot("k", "t", "c", "y", times | {2: {"train": 10.0}}, colours, str).svg
    assert "train: 150.0." in drawn
    assert "schedule: 0.25." in drawn
    assert stacked_plot("k", "t", "c", "y", {1: {"train": 0.0}}, colours, str).svg == ""


def test_stages_with_tokens_keep_their_colour_however_short_they_are() -> None:
    times = {1: {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0, "e": 5.0, "f": 0.1}}
    assert list(stage_colours({1: {"f": 3.0}}, times)) == ["a", "b", "c", "d", "f"]


def test_figures_are_written_for_readers() -> None:
    assert rate_words((0.71875, 0.648, 0.78125)) == "71.9 % (64.8–78.1)"
    assert [rate_words(None), rate_words((math.nan, 0.1, 0.2))] == ["–", "–"]
    assert [cost_words(v) for v in (None, 0.0, 0.001, 0.25, 1234.5)] == ["–", "$0.00", "< $0.01", "$0.25", "$1,234.50"]
    assert [reward_words(v) for v in (None, math.inf, -0.5, 1.25)] == ["–", "–", "−0.500", "+1.250"]
