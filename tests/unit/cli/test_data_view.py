"""What `inspect data` gathers, prints and writes, from a real artifact and from made-up accounts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes
from dpo_ray.cli.app import main
from dpo_ray.cli.data_view import figures, print_account, text_histogram
from dpo_ray.config.model import ModelConfig
from dpo_ray.data.schemas import QUARANTINE, TOKENS
from dpo_ray.data.statistics import measure
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.models.load import model_directory
from dpo_ray.observe.text import harmless
from dpo_ray.report.data_page import (
    DataPage,
    TextPiece,
    bias_by_source_words,
    bias_words,
    label_words,
    render_data_page,
    token_spans,
)
from dpo_ray.report.data_report import measured_of, shown_sources, tokenizer_of
from dpo_ray.report.histograms import Counted
from dpo_ray.report.samples import group_text, pieces, quarantine_examples, rendered_samples
from tests.helpers.pages import Page, data_page, pairs

HOSTILE = "[red]x[/red] [/] \x1b[2J\x1b]0;title\x07 \x00\r\n\t \u202eback \ud800 :smile: <script>alert(1)</script>"
CREATED = "2025-01-02T03:04:05Z"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(model_directory(ModelConfig(path="builtin:sentiment_llama"))))


def groups(texts: Sequence[tuple[str, str, str]], tokenizer: Any, source: str) -> pa.Table:
    rows = [
        {
            "group_id": (97 * i % 256).to_bytes(16, "big"),
            "source": source,
            "prompt_ids": tokenizer(prompt)["input_ids"],
            "completion_ids": [
                [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in both
            ],
            "scores": [1.0, 0.0],
            "chosen": [0],
            "rejected": [1],
            "preference_probability": 2 / 3,
            "weight": 1.0,
        }
        for i, (prompt, *both) in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=TOKENS)


@pytest.fixture
def tokens(tmp_path: Path, tokenizer: Any) -> Artifact:
    """Commit an artifact of two training sources, held-out data, and a quarantine in two files."""
    staging = ArtifactStore(Storage(tmp_path)).begin("prepare", "k0", "test")
    many = [(f"the film {i} was", f" good {i}", " bad") for i in range(9)]
    parts = {
        "train/00000-00000-00000": groups(many, tokenizer, "first"),
        "train/00000-00000-00001": groups([("never shown", " a", " b")], tokenizer, "first"),
        "train/00001-00000-00000": groups(many[:2], tokenizer, "second"),
        "eval/00000-00000-00000": groups(many[5:6], tokenizer, "held out"),
    }
    entries = [staging.write(f"{name}.parquet", parquet_bytes(t), rows=len(t)) for name, t in parts.items()]
    for part, reasons in enumerate((["TIE", "TIE", "JSON_SYNTAX"], ["TIE", "BAD_ROLE"])):
        rows = [
            {
                "reason": r,
                "detail": "",
                "split": "train",
                "source": "first",
                "ordinal": 10 * part + i,
                "sample": HOSTILE[:9],
            }
            for i, r in enumerate(reasons)
        ]
        table = pa.Table.from_pylist(rows, schema=QUARANTINE)
        name = f"quarantine/train/00000-00000-0000{part}.parquet"
        entries.append(staging.write(name, parquet_bytes(table), rows=len(table)))
    reasons = {"TIE": 3, "JSON_SYNTAX": 1, "BAD_ROLE": 1}
    accounts = [
        {"split": split, "index": index, "source": source, "reasons": reasons if source == "first" else {}}
        for split, index, source in (("train", 0, "first"), ("train", 1, "second"), ("eval", 0, "held out"))
    ]
    rows = {"train/admitted": 12, "eval/admitted": 1}
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={"accounts": accounts})


def test_samples_are_spread_over_sources_and_decode_to_what_is_trained_on(tokens: Artifact, tokenizer: Any) -> None:
    samples = rendered_samples(tokens, tokenizer, 4)
    assert [(s.split, s.source) for s in samples] == [
        ("train", "first"),
        ("train", "first"),
        ("train", "second"),
        ("eval", "held out"),
    ]
    assert samples == rendered_samples(tokens, tokenizer, 4)
    assert [s.source for s in rendered_samples(tokens, tokenizer, 1)] == ["first"]
    assert rendered_samples(tokens, tokenizer, 0) == []
    first = samples[0]
    assert "".join(p.text for p in first.prompt if not p.special).strip() == "the film 0 was"
    assert first.note == "chosen better with probability 0.67"
    chosen, rejected = first.completions
    assert (chosen.label, rejected.label) == ("chosen", "rejected")
    assert chosen.pieces[-1] == TextPiece(tokenizer.eos_token, special=True)
    assert chosen.ended
    assert "".join(p.text for p in rejected.pieces[:-1]).strip() == "bad"
    assert sum(p.tokens for p in chosen.pieces) == chosen.tokens


def test_a_long_sample_shows_its_ends_and_says_what_it_hides(tmp_path: Path, tokenizer: Any) -> None:
    long = " ".join(f"w{i}" for i in range(2000))
    table = groups([(long, long, " bad")], tokenizer, "s")
    staging = ArtifactStore(Storage(tmp_path)).begin("prepare", "k0", "test")
    entry = staging.write("train/00000-00000-00000.parquet", parquet_bytes(table), rows=1)
    account = {"split": "train", "index": 0, "source": "s", "reasons": {}}
    artifact = Provenance(1, {}, {}, {}).commit(
        staging, [entry], rows={"train/admitted": 1}, figures={"accounts": [account]}
    )
    (sample,) = rendered_samples(artifact, tokenizer, 3)
    assert sample.hidden_tokens + sum(p.tokens for p in sample.prompt) == sample.prompt_tokens
    chosen = sample.completions[0]
    shown = sum(p.tokens for p in (*chosen.pieces, *chosen.last_pieces))
    assert chosen.hidden_tokens > 0
    assert shown + chosen.hidden_tokens == chosen.tokens
    assert chosen.last_pieces[-1].special


def test_characters_of_several_tokens_stay_whole() -> None:
    """A tokenizer of bytes: every character beyond ASCII is several tokens."""
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    text = "aé🥚b\n"
    found = pieces(tokenizer(text)["input_ids"], tokenizer)
    assert [p.text for p in found] == list(text)
    assert [p.tokens for p in found] == [1, 2, 4, 1, 1]
    broken = tokenizer("é")["input_ids"][:1]  # truncation may cut within a character
    assert [p.text for p in pieces(broken, tokenizer)] == ["\N{REPLACEMENT CHARACTER}"]


def test_examples_are_the_first_rows_of_each_reason(tokens: Artifact) -> None:
    found = quarantine_examples(tokens, 2)
    assert {reason: [row["ordinal"] for row in rows] for reason, rows in found.items()} == {
        "TIE": [0, 1],
        "JSON_SYNTAX": [2],
        "BAD_ROLE": [11],
    }
    assert sum(map(len, quarantine_examples(tokens, 10**9).values())) == 5


def test_a_group_that_a_rule_left_out_is_found_in_its_shard(tmp_path: Path, tokenizer: Any) -> None:
    table = groups([("the film was", " good", " bad")], tokenizer, "s")
    staging = ArtifactStore(Storage(tmp_path)).begin("shard", "k0", "test")
    entry = staging.write("groups/00000-00000.parquet", parquet_bytes(table), rows=1)
    shard = Provenance(1, {}, {}, {}).commit(staging, [entry], rows={}, figures={})
    text = group_text(shard, "00000-00000.parquet", bytes(16), tokenizer)
    assert re.search(r"the film was \| good.* \| bad", text)
    assert group_text(shard, "00000-00000.parquet", b"x" * 16, tokenizer) == ""
    assert group_text(shard, "00000-00009.parquet", bytes(16), tokenizer) == ""


def printed(page: DataPage, *, terminal: bool = False, width: int = 160) -> str:
    out = io.StringIO()
    print_account(page, HOSTILE, "runs/x/data.html", Console(file=out, width=width, force_terminal=terminal))
    return out.getvalue()


def test_the_terminal_shows_the_account() -> None:
    words = " ".join(printed(data_page()).split())
    for expected in (
        "│ hh │ train │ 330 │ 300 │ 3 │ 20 │ 7 │",
        "train: 3 of 420 rows are unsound (0.71 %); at most 1 % are allowed",
        "JSON_SYNTAX │ unsound │ 3 │ the line is not JSON",
        "Chosen is the longer one in",
        "Soft labels: the probability that chosen is the better one is 1.00 in 83.3 %, 0.67 in 16.7 % of the groups.",
        "with each prompt once",
        "… 72 tokens before …",
        "Boil│⏎",
        "⟦</s>⟧",
        "300 tokens, trained on, cut: no end-of-turn token",
        "runs/x/data.html",
    ):
        assert expected in words, expected


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [20, 80])
def test_hostile_text_neither_crashes_nor_commands_the_terminal(terminal: bool, width: int) -> None:
    out = printed(data_page(HOSTILE), terminal=terminal, width=width)
    out.encode("utf-8")
    assert set(re.findall(r"\x1b.{0,2}", out)) <= set(re.findall(r"\x1b\[\d?", out))  # colours, no commands of others
    assert "\x1b[2J" not in out
    assert not {"\x00", "\x07", "\r", "\u202e", "\t"} & set(out)
    if width == 80:
        assert "[red]x[/red]" in "".join(out.split("\n")).replace(" ", "") or terminal


def test_the_command_explains_itself_and_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        (["inspect", "data", "--help"], 0, ("RECIPE", "KEY.PATH=VALUE", "--sample", "--json", "prepare")),
        (["inspect", "--help"], 0, ("data",)),
        (["inspect", "data", "x.yaml", "--sample", "-1"], 2, ("--sample",)),
        (["inspect", "data", "no-such-recipe.yaml"], 2, ("no-such-recipe.yaml",)),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        assert stopped.value.code == code
        assert all(word in out + err for word in words)


def test_harmless_text_is_left_as_it_is() -> None:
    assert harmless("Grüße, 你好 [bold] :smile:") == "Grüße, 你好 [bold] :smile:"
    assert (
        harmless("a\x1b\x07\n\ud800\u202e\x85")
        == "a␛␇⏎\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )


def test_an_empty_account_is_printed_and_written() -> None:
    assert "rows by source" in printed(DataPage())
    page = Page(render_data_page(DataPage(), name="x", created=CREATED, what="y"))
    assert "rows were not counted" in page.words()


def test_json_holds_what_the_page_shows() -> None:
    said = json.loads(json.dumps(figures(data_page(HOSTILE), "runs/x/data.html")))
    assert said["splits"][0]["faults"] == 3
    assert [m["source"] for m in said["statistics"]][:2] == [None, "hh"]
    assert said["statistics"][2]["probabilities"] == {"0.67": 60}
    assert said["reasons"][1]["examples"][0]["text"] == HOSTILE
    assert said["samples"][0]["completions"][0]["pieces"][-1]["special"] is True


def test_the_page_of_its_own_is_well_formed_and_links_to_its_parts() -> None:
    html = render_data_page(data_page(HOSTILE), name=HOSTILE, created=CREATED, what=HOSTILE)
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {h[1:] for h in page.values("href")} <= set(ids)
    assert not {"script", "img", "link"} & {tag for tag, _ in page.tags}
    assert page.values("style") == []
    assert re.search(r"https?://", html) is None
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "2025-01-02 03:04:05 UTC" in page.words()
    assert html == render_data_page(data_page(HOSTILE), name=HOSTILE, created=CREATED, what=HOSTILE)


def test_the_page_answers_what_it_is_asked() -> None:
    words = Page(render_data_page(data_page(), name="x", created=CREATED, what="y")).words()
    for expected in (
        "every row accounted for",
        "train: 3 of 420 rows are unsound (0.71 %); at most 1 % are allowed. within the limit",
        "Dropped as duplicates of an earlier row: 7, 2 of them near duplicates.",
        "138 tokens, which is the limit",
        "Chosen is the longer one in",
        "packed, each prompt once (as trained here)",
        "Boil⏎",
        "300 tokens, cut: no end-of-turn token",
    ):
        assert expected in words, expected


def test_tokens_are_marked_one_by_one_and_escaped() -> None:
    spans = token_spans([TextPiece("<b>"), TextPiece("a\nb"), TextPiece("</s>", special=True)])
    assert str(spans) == (
        '<span>&lt;b&gt;</span><span>a<i class="break">⏎</i>\nb</span><span class="special">&lt;/s&gt;</span>'
    )


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([(5, 20, 10)] * 500, "r = +1.000: a strong bias towards longer completions; a policy can win"),
        ([(5, 10, 20)] * 500, "10.0 tokens shorter (10.0 against 20.0)"),
        ([(5, 20, 10), (5, 10, 20)] * 200, "r = +0.000: no bias that can be distinguished from chance"),
        ([(5, 20, 10), (5, 10, 20)] * 1000 + [(5, 20, 10)] * 160, "a slight bias towards longer completions."),
        ([(5, 9, 9)] * 4, "cannot be correlated"),
        ([], "no pairs"),
    ],
)
def test_the_length_bias_is_said_in_words(lengths: list[tuple[int, int, int]], words: str) -> None:
    assert words in bias_words(measured_of("train", "", measure(pairs(lengths))).summary["length_bias"])


def test_opposite_biases_of_two_sources_are_not_hidden_by_the_whole() -> None:
    def bias(chosen: int, rejected: int) -> Any:
        return measured_of("train", "", measure(pairs([(5, chosen, rejected)] * 9))).summary["length_bias"]

    assert bias_by_source_words([("a", bias(20, 10)), ("b", bias(10, 20))]) == (
        "By source: a +1.000, b \N{MINUS SIGN}1.000; opposite biases, which cancel out in the total."
    )
    assert bias_by_source_words([("a", bias(20, 10)), ("b", bias(30, 10))]).endswith("b +1.000.")
    assert bias_by_source_words([("a", bias(20, 10)), ("b", None), ("c", bias(10, 10))]) == ""


def test_certain_labels_need_no_words() -> None:
    assert label_words({1.0: 5}) == ""
    assert label_words({}) == ""
    assert label_words({0.5: 1, 1.0: 3}).endswith("is 1.00 in 75.0 %, 0.50 in 25.0 % of the groups.")


def test_differences_of_both_signs_are_counted_on_one_axis() -> None:
    lengths = [(5, 10, 10), (5, 12, 10), (5, 10, 13), (5, 10, 13), (5, 300, 100)]
    counted = measured_of("train", "", measure(pairs(lengths))).counted["difference"]
    assert counted.total == 5
    assert counted.within(np.array([-4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [0, 2, 0, 0, 1, 0, 1]
    assert counted.mean == pytest.approx((2 - 3 - 3 + 200) / 5)
    assert counted.quantile(0.4) == -3
    one_sided = measured_of("train", "", measure(pairs([(5, 12, 10)] * 3))).counted["difference"]
    assert one_sided.within(np.array([-0.5, 1.5, 2.5])).tolist() == [0, 3]


def test_a_text_histogram_shows_even_the_rare() -> None:
    counted = Counted(np.arange(25), np.array([1000, *[0] * 22, 1]), 0.0)
    bars = text_histogram(counted, 23)
    assert (bars[0], bars[1], bars[-1], len(bars)) == ("█", " ", "▁", 24)
    assert text_histogram(Counted(np.arange(2), np.array([0]), 0.0), 5) == ""


def test_of_very_many_sources_the_smallest_are_added_up() -> None:
    accounts = [
        {
            "split": "train",
            "source": f"s{i}",
            "rows_in": i + 1,
            "admitted": i,
            "duplicates": 0,
            "near_duplicates": 0,
            "reasons": {"TIE": 1},
        }
        for i in range(100)
    ]
    rows = shown_sources(accounts, "train")
    assert len(rows) == 41
    assert rows[0].source == "s60"
    assert rows[-1].source == "60 other sources"
    assert sum(row.rows_in for row in rows) == sum(range(101))
    assert sum(row.rules for row in rows) == 100
    assert all(row.unaccounted == 0 for row in rows)


def test_a_model_that_has_gone_leaves_the_account_without_samples() -> None:
    plan = SimpleNamespace(recipe=SimpleNamespace(model=ModelConfig(path="/nowhere/at/all")))
    tokenizer, note = tokenizer_of(plan)  # type: ignore[arg-type]
    assert tokenizer is None
    assert "no such model directory" in note
