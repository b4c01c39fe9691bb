"""The run report stands alone, shows every part, keeps foreign text harmless and stays small."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import random
import re

import matplotlib
import numpy as np
import pytest
from jinja2 import UndefinedError

from dpo_ray.config.model import ModelConfig
from dpo_ray.config.objective import OrpoObjective
from dpo_ray.config.train import BestConfig, LoraConfig, TrainConfig
from dpo_ray.observe.model_card import model_card
from dpo_ray.report.data_page import EXAMPLE_CHARACTERS, DataPage, Example, LeftOut, RowCounts
from dpo_ray.report.histograms import heldout_plots
from dpo_ray.report.page import excerpt, format_number, format_seconds, format_share, format_time
from dpo_ray.report.plots import running_mean, smoothing_window, training_plots, typographic
from dpo_ray.report.reference_page import Check, ReferencePage
from dpo_ray.report.run_page import MAX_SAMPLES, SAMPLE_CHARACTERS, ReportData, Tile, render_report
from dpo_ray.report.run_report import best_step
from tests.helpers.pages import Page, data_page, reference_page

SECTIONS = ("summary", "training", "held-out", "samples", "data", "reference", "stages", "recipe", "versions")
PLOTS = (
    "loss",
    "margins",
    "accuracy",
    "rewards",
    "logps",
    "gradient",
    "throughput",
    "reward-distribution",
    "kl",
    "lengths",
    "length-difference",
    "token-drift",
    "pair-error",
)
SOURCE_PLOTS = ("lengths-1", "lengths-2")
HOSTILE = "<script>alert(1)</script><img src=https://evil.example/x onerror='alert(1)'></p></section>"


def train_rows(steps: int) -> list[dict[str, float]]:
    noise = random.Random(7)
    return [
        {
            "step": step,
            "loss": 0.693 * math.exp(-step / steps) + noise.gauss(0, 0.02),
            "rewards/chosen": noise.gauss(0.3, 0.1),
            "rewards/rejected": noise.gauss(-0.9, 0.1),
            "rewards/margins": noise.gauss(1.2, 0.1),
            "rewards/accuracies": noise.uniform(0.5, 1.0),
            "logps/chosen": noise.gauss(-210, 5),
            "logps/rejected": noise.gauss(-220, 5),
            "grad_norm": noise.uniform(1, 3),
            "learning_rate": 5e-7 * step / steps,
            "num_tokens": 1000.0 * step,
            "epoch": step / steps,
            "tokens_per_second": noise.gauss(18000, 500),
            "seconds_per_step": noise.gauss(2, 0.1),
        }
        for step in range(1, steps + 1)
    ]


def full_data(steps: int = 40) -> ReportData:
    noise = random.Random(3)
    return ReportData(
        name="tiny-run",
        created="2025-01-02T03:04:05+00:00",
        what="Sigmoid DPO on 90 groups.",
        headline=[Tile("Final loss", 0.41234, "last step"), Tile("Rows", 12345)],
        comparison=[("True reward", "0.31", "0.57")],
        train_metrics=train_rows(steps),
        eval_metrics=[{"step": steps, "eval_loss": 0.5, "eval_rewards/accuracies": 0.7, "eval_rewards/margins": 0.9}],
        heldout_rewards={
            "chosen": [noise.gauss(0.3, 1) for _ in range(200)],
            "rejected": [noise.gauss(-1, 1) for _ in range(200)],
        },
        kl_per_sample=[noise.gauss(2, 1) for _ in range(64)],
        data=data_page(),
        reference=reference_page(),
        samples=[
            {
                "prompt": "Hello?",
                "reference": "Hi.",
                "policy": "Good day.",
                "reference_score": 0.25,
                "policy_score": 0.75,
            }
        ],
        stages=[{"stage": "train", "key": "train-0011", "state": "built", "seconds": 8040.0, "rows": None}],
        recipe_yaml="objective:\n  type: sigmoid\n  beta: 0.1\n",
        versions={"torch": "2.13.0"},
        paths={"policy": "runs/tiny/policy"},
    )


EMPTY = ReportData(name="empty", created="2025-01-02T03:04:05+00:00", what="Nothing ran.")


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(full_data())


@pytest.mark.parametrize("data", [full_data(), full_data(1), EMPTY], ids=["full", "one step", "empty"])
def test_every_section_is_present_well_formed_and_linked(data: ReportData) -> None:
    page = Page(render_report(data))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert [a["id"] for tag, a in page.tags if tag == "section"] == list(SECTIONS)
    assert [h for h in page.values("href") if not h.startswith("#")] == []
    assert {h[1:] for h in page.values("href")} <= set(ids)
    assert {f"plot-{key}" for key in PLOTS} <= set(ids)


def test_figures_of_the_data_are_shown(html: str) -> None:
    words = Page(html).words()
    for expected in (
        "tiny-run",
        "0.4123",
        "12,345",
        "True reward0.310.57",
        "judged plain",
        "the line is not JSON",
        "every row accounted for",
        "vllm 0.32.0",
        "2 engines, bfloat16, cuda",
        "43.2 % from the prompt cache",
        "kills_engine",
        "passed 64 groups, 60 pairs, 12,480 completion tokens compared.",
        "margin_error",
        "0.0312",
        "Good day.",
        "score 0.75",
        "2 h 14 min",
        "beta: 0.1",
        "2.13.0",
        "runs/tiny/policy",
    ):
        assert expected in words, expected
    assert "Not measured" not in words


def test_empty_data_says_not_measured_and_draws_nothing() -> None:
    html = render_report(EMPTY)
    assert html.count(">Not measured<") == len(PLOTS)
    assert 'role="img"' not in html
    noted = dataclasses.replace(EMPTY, reference=ReferencePage(audit_note="Not audited: the recipe turns it off."))
    assert "Not audited: the recipe turns it off." in Page(render_report(noted)).words()


def test_nothing_is_fetched_or_executed(html: str) -> None:
    page = Page(html)
    fetching = {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    assert not fetching & {tag for tag, _ in page.tags}
    for attribute in ("src", "srcset", "style", "action", "data", "xlink:href"):
        assert page.values(attribute) == []
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert re.search(r"https?://|@import", html) is None
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_policy_admits_exactly_the_style_sheet_of_the_page(html: str) -> None:
    policy = next(
        a["content"] for tag, a in Page(html).tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_every_plot_is_described_and_coloured_by_the_page(html: str) -> None:
    page = Page(html)
    drawn_keys = [*PLOTS[:-3], *SOURCE_PLOTS, *PLOTS[-3:]]
    drawn = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert [a["aria-labelledby"] for a in drawn] == [f"{key}-title {key}-desc" for key in drawn_keys]
    assert "training: " in page.words()
    assert "at step 40" in page.words()
    body = html.split("</head>")[1]
    assert re.findall(r"#0000\d\d|stroke=\"#|fill=\"#", body) == []  # no fixed colour is left, nor a stand-in
    assert all(a.get("scope") in {"col", "row", "rowgroup"} for tag, a in page.tags if tag == "th")


def test_foreign_text_is_escaped_everywhere() -> None:
    data = dataclasses.replace(
        full_data(1),
        name=HOSTILE,
        what=HOSTILE,
        created=HOSTILE,
        headline=[Tile(HOSTILE, HOSTILE, HOSTILE)],
        comparison=[(HOSTILE, HOSTILE, HOSTILE)],
        data=data_page(HOSTILE),
        reference=reference_page(HOSTILE),
        samples=[{"prompt": HOSTILE, "reference": HOSTILE, "policy": HOSTILE}],
        stages=[{"stage": HOSTILE, "key": HOSTILE, "state": HOSTILE, "note": HOSTILE}],
        recipe_yaml=HOSTILE,
        versions={HOSTILE: HOSTILE},
        paths={HOSTILE: HOSTILE},
    )
    html = render_report(data)
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    in_attributes = 1  # the time's `datetime`
    assert html.count("&lt;script&gt;") == page.words().count("<script>") + in_attributes


def test_broken_text_is_made_writable() -> None:
    broken = {"prompt": "a\x00b\x1b[31m", "reference": "\ud800", "policy": "ok"}
    data = dataclasses.replace(EMPTY, samples=[broken])
    html = render_report(data)
    assert html.encode("utf-8")
    assert "a\u2400b\u241b[31m" in html
    assert "\x00" not in html


def test_long_text_and_many_samples_are_cut() -> None:
    long = "x" * 100_000
    data = dataclasses.replace(
        EMPTY,
        samples=[{"prompt": long, "reference": long, "policy": long}] * (MAX_SAMPLES + 5),
        data=DataPage(reasons=[LeftOut("TIE", "rule", "m", 1, {}, [Example("w", long, long)])]),
    )
    html = render_report(data)
    assert html.count("<article") == MAX_SAMPLES
    assert f"The first {MAX_SAMPLES} of {MAX_SAMPLES + 5}." in html
    assert html.count("x" * SAMPLE_CHARACTERS) == 3 * MAX_SAMPLES
    assert "x" * (SAMPLE_CHARACTERS + 1) not in html
    assert html.count(f"{100_000 - EXAMPLE_CHARACTERS:,} more characters") == 2


def test_same_data_gives_the_same_page_whatever_matplotlib_is_set_to(html: str) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "svg.hashsalt": "other", "axes.grid": False}):
        assert render_report(full_data()) == html
    assert matplotlib.rcParams["svg.hashsalt"] != "dpo_ray"


def test_size_does_not_grow_with_the_run() -> None:
    small, large = (len(render_report(full_data(steps)).encode()) for steps in (500, 2_000))
    assert large < 1_500_000
    assert large < 1.3 * small


def test_rows_that_are_lost_are_called_out() -> None:
    lost = RowCounts("train", "a", rows_in=10, admitted=6, faults=2, rules=0, duplicates=1)
    gained = dataclasses.replace(lost, admitted=8)  # one lost and one gained do not cancel out
    assert lost.unaccounted == 1
    assert gained.unaccounted == -1
    words = Page(render_report(dataclasses.replace(EMPTY, data=DataPage(sources=[lost, gained])))).words()
    assert "2 rows not accounted for" in words
    assert "every row accounted for" not in words


def test_a_row_without_a_required_field_is_refused() -> None:
    with pytest.raises(UndefinedError, match="state"):
        render_report(dataclasses.replace(EMPTY, stages=[{"stage": "train", "key": "k"}]))


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]
    loss = training_plots(rows, [])[0]
    assert "Left out as not finite: 2." in loss.caption
    assert "training: 0.7 at step 1." in loss.svg
    kl = heldout_plots({}, [1.0, math.nan])[1]
    assert "Left out as not finite: 1." in kl.caption


def test_far_outliers_are_counted_beyond_the_axis() -> None:
    values = [float(i % 10) for i in range(1_000)]
    assert "Beyond" not in heldout_plots({}, values)[1].caption
    assert "Beyond the axis: 1." in heldout_plots({}, [*values, 1e6])[1].caption


def test_a_step_recorded_twice_counts_once_by_its_later_record() -> None:
    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 0.5}]
    assert "training: 0.7 at step 1, 0.5 at step 2, between 0.5 and 0.7." in training_plots(rows, [])[0].svg


def test_running_mean_is_the_mean_of_a_centred_window() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_array_equal(running_mean(values, 1), values)
    assert smoothing_window(10) == 1
    assert smoothing_window(300) == 11


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.41234, "0.4123"),
        (1588, "1,588"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (3.0, "3"),
        (True, "yes"),
        (None, "–"),
        ("71.8 %", "71.8 %"),
        (math.nan, "not finite"),
        (18412.4, "18,412"),
        (2.5e20, "2.5e20"),
        (-3.1e-5, "\N{MINUS SIGN}3.1e\N{MINUS SIGN}5"),
    ],
)
def test_numbers_are_written_for_readers(value: object, text: str) -> None:
    assert format_number(value) == text  # pyright: ignore[reportArgumentType]


def test_shares_are_never_rounded_to_none_or_all() -> None:
    shares = [(0, 5), (1, 3), (5, 5), (1, 3000), (1, 1_000_000), (999_999, 1_000_000), (9_990, 10_000), (1, 0)]
    assert [format_share(*s) for s in shares] == [
        "0 %",
        "33.3 %",
        "100 %",
        "0.03 %",
        "< 0.01 %",
        "> 99.99 %",
        "99.90 %",
        "–",
    ]


def test_times_excerpts_and_exponents_are_written_for_readers() -> None:
    assert [format_seconds(s) for s in (None, 0.31, 59.96, 185, 3599.7, 8040)] == [
        "–",
        "0.3 s",
        "60 s",
        "3 min 05 s",
        "60 min 00 s",
        "2 h 14 min",
    ]
    assert format_time("2025-01-02T03:04:05Z") == "2025-01-02 03:04:05 UTC"
    assert format_time("2025-01-02T03:04:05+00:00") == "2025-01-02 03:04:05+00:00"
    assert format_time("<T>") == "<T>"
    assert excerpt("abc", 3) == "abc"
    assert excerpt("abcd", 3) == "abc … (1 more characters)"
    assert typographic("5e-07") == "5e\N{MINUS SIGN}7"


def test_what_drifts_is_drawn_counted_and_called_by_its_verdict() -> None:
    page = reference_page()
    words = Page(render_report(dataclasses.replace(EMPTY, reference=page))).words()
    tokens = sum(page.measured["drift_histogram"]["counts"]) + 9
    assert f"n = {tokens:,}. Beyond the axis: 9." in words
    assert "60 pairs; lengths differ by " in words
    assert "signed_bias0.00210.002 too few to tell" in words
    assert "length_correlation0.04– not judged" in words
    failed = dataclasses.replace(page, passed=False, checks=[Check("max_token_drift", 3, 0.5, "over", "Far off.")])
    words = Page(render_report(dataclasses.replace(EMPTY, reference=failed))).words()
    assert "over its limits 64 groups" in words
    assert "max_token_drift30.5 over Far off." in words


def test_no_difference_is_not_called_not_measured() -> None:
    same = {
        "groups": 1,
        "pairs": 1,
        "tokens": 2,
        "worst_groups": [],
        "drift_histogram": {"range_nats": 0.0, "counts": [], "beyond": 0},
        "pair_errors": {"length_difference": [0], "error_nats": [0.0]},
    }
    page = ReferencePage(passed=True, measured=same)
    words = Page(render_report(dataclasses.replace(EMPTY, reference=page))).words()
    assert words.count("No difference at all") == 2
    assert "Groups that drift most" not in words


def test_curves_of_what_only_some_runs_measure_are_drawn_where_it_was_measured() -> None:
    keys = [plot.key for plot in training_plots(train_rows(4), [])]
    assert keys == list(PLOTS[:7])
    more = {"kl": 0.1, "mfu": 0.4, "tflops": 9.0, "entropy": 1.5, "grad_norm/head": 0.2, "rewards/accuracies/hh": 0.75}
    rows = [row | more for row in train_rows(4)]
    plots = {p.key: p for p in training_plots(rows, [{"step": 4, "eval_loss": 0.5, "eval_hard_loss": 0.625}])}
    new = {"kl-estimate", "use", "mfu", "entropy", "gradient-by-part", "accuracy-by-source", "loss-by-set"}
    assert plots.keys() - set(keys) == new
    assert "hh: 0.75 at step 1, 0.75 at step 4" in plots["accuracy-by-source"].svg
    assert "hard: 0.625 at step 4." in plots["loss-by-set"].svg
    assert "share saved" not in plots["use"].svg  # a panel of nothing is left out


def test_more_sources_than_there_are_colours_are_named_instead() -> None:
    row = {"step": 1, **{f"rewards/accuracies/s{i}": 0.5 for i in range(7)}}
    (plot,) = [p for p in training_plots([row], []) if p.key == "accuracy-by-source"]
    assert "s4: 0.5" in plot.svg
    assert "s5: " not in plot.svg
    assert "Not drawn: s5, s6." in plot.caption


def test_unpaired_data_has_no_accuracy_and_the_page_says_why() -> None:
    rows = [{k: v for k, v in row.items() if k != "rewards/accuracies"} for row in train_rows(3)]
    plots = {p.key: p for p in training_plots(rows, [])}
    assert (plots["accuracy"].svg, plots["accuracy"].instead) == ("", "The data has no pairs to compare")
    assert plots["rewards"].svg


def test_the_best_step_is_marked_where_held_out_data_is_drawn() -> None:
    evaluations = [{"step": s, "eval_loss": v} for s, v in ((2, 0.6), (4, 0.5), (6, 0.5), (8, 0.7))]
    assert best_step(BestConfig(metric="eval_loss", mode="min"), evaluations) == 4
    assert best_step(BestConfig(metric="eval_loss", mode="max"), evaluations) == 8
    assert best_step(BestConfig(metric="eval_rewards/accuracies"), evaluations) is None
    assert best_step(None, evaluations) is None
    marked = {p.key for p in training_plots(train_rows(8), evaluations, 4) if "Dotted: step 4, the best" in p.caption}
    assert marked == {"loss"}


@pytest.mark.parametrize(
    ("train", "said", "not_said"),
    [
        (TrainConfig(), ["library_name: transformers", "The reference model is the base model."], ["LoRA"]),
        (TrainConfig(objective=OrpoObjective()), ["needs no reference"], ["The reference model is"]),
        (TrainConfig(lora=LoraConfig(rank=8)), ["library_name: peft", "rank 8", "with PEFT"], ["merged into"]),
        (TrainConfig(lora=LoraConfig(merge=True)), ["library_name: transformers", "merged into"], ["PEFT"]),
    ],
)
def test_the_card_says_what_the_directory_holds(train: TrainConfig, said: list[str], not_said: list[str]) -> None:
    card = model_card("r", ModelConfig(path="a/b"), train, {}, 3, {"loss": 0.5}, {}, "x: 1", {"torch": "2"})
    assert [words for words in said if words not in card] == []
    assert [words for words in not_said if words in card] == []
