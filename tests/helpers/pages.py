"""What tests of pages share: a strict reader of HTML, and made-up accounts of data and of a reference."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pyarrow as pa

from dpo_ray.data.schemas import TOKENS
from dpo_ray.data.statistics import measure, merged
from dpo_ray.report.data_page import (
    DataPage,
    Example,
    LeftOut,
    RenderedCompletion,
    RenderedSample,
    RowCounts,
    TextPiece,
)
from dpo_ray.report.data_report import measured_of
from dpo_ray.report.reference_page import Check, ReferencePage, Scoring, UnscoredRow

VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Read a page, insisting that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]

    def words(self) -> str:
        return " ".join("".join(self.text).split())


def pairs(lengths: list[tuple[int, int, int]], probability: float = 1.0) -> pa.Table:
    """Make a table of groups of one pair from tokens of (prompt, chosen, rejected)."""
    rows = [
        {
            "group_id": i.to_bytes(16, "big"),
            "source": "s",
            "prompt_ids": [7] * p,
            "completion_ids": [[8] * c, [9] * r],
            "scores": [1.0, 0.0],
            "chosen": [0],
            "rejected": [1],
            "preference_probability": probability,
            "weight": 1.0,
        }
        for i, (p, c, r) in enumerate(lengths)
    ]
    return pa.Table.from_pylist(rows, schema=TOKENS)


def data_page(text: str = "plain") -> DataPage:
    """Make an account of two sources of which one has soft labels; `text` stands wherever text may be foreign."""
    hh = measure(pairs([(40 + i % 50, 20 + i % 30, 12 + i % 25) for i in range(300)]))
    judged = measure(pairs([(20, 30, 10)] * 60, probability=2 / 3))
    statistics = {"hh": hh, f"judged {text}": judged}
    return DataPage(
        sources=[
            RowCounts("train", "hh", 330, 300, 3, 20, 7, 2),
            RowCounts("train", f"judged {text}", 90, 60, 0, 30, 0),
        ],
        splits=[RowCounts("train", "", 420, 360, 3, 50, 7, 2)],
        reasons=[
            LeftOut("TIE", "rule", "no completion is better", 50, {"train · hh": 20, f"train · judged {text}": 30}),
            LeftOut(
                "JSON_SYNTAX",
                "fault",
                "the line is not JSON",
                3,
                {"train · hh": 3},
                [Example("train · hh, row 12", text, text)],
            ),
        ],
        measured=[
            measured_of("train", "", merged(statistics.values())),
            *(measured_of("train", name, s) for name, s in statistics.items()),
        ],
        samples=[
            RenderedSample(
                split="train",
                source=text,
                note="chosen better with probability 0.67",
                prompt_tokens=312,
                hidden_tokens=72,
                prompt=[TextPiece("<s>", special=True), TextPiece("Cook"), TextPiece(" an"), TextPiece(text)],
                completions=[
                    RenderedCompletion(
                        "chosen",
                        "chosen",
                        3,
                        [TextPiece(" Boil"), TextPiece("\n"), TextPiece("</s>", special=True)],
                        0,
                        [],
                        True,
                    ),
                    RenderedCompletion("rejected", "rejected", 300, [TextPiece(text)], 298, [TextPiece(" so")], False),
                ],
            )
        ],
        max_length_tokens=138,
    )


def reference_page(text: str = "plain") -> ReferencePage:
    """Make an account of a reference that passed its audit; `text` stands wherever text may be foreign."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(-80, 80, 60)
    drift = rng.normal(0, 0.03, 12_480)
    return ReferencePage(
        scoring=Scoring(
            engine="vllm 0.32.0",
            numerics="bfloat16, cuda",
            engines=2,
            sequences=18_412,
            found=2_000,
            tokens=10_000_000,
            cached_tokens=4_321_000,
            tokens_per_second=51_234.5,
            rescored=12,
        ),
        note=text,
        unscored=[UnscoredRow("kills_engine", "two engines died while they scored this group", 2, [text, "group 07"])],
        checks=[
            Check("max_token_drift", 0.21, 0.5, "within", "Largest difference of one token."),
            Check("signed_bias", 0.0021, 0.002, "too few", "Mean difference with its sign."),
            Check("margin_error", 0.0312, 0.1, "within", "Noise in every pair's reward."),
            Check("length_correlation", 0.04, None, "not judged", "Correlation with the difference in length."),
        ],
        passed=True,
        measured={
            "groups": 64,
            "pairs": 60,
            "tokens": 12_480,
            "worst_groups": [{"group_id": "0f" * 16, "max_token_drift": 0.21, "mean_token_drift": 0.03}],
            "drift_histogram": {
                "range_nats": 0.1,
                "counts": np.histogram(drift, bins=41, range=(-0.1, 0.1))[0].tolist(),
                "beyond": 9,
            },
            "pair_errors": {
                "length_difference": lengths.tolist(),
                "error_nats": (rng.normal(0, 0.5, 60) + 0.002 * lengths).tolist(),
            },
        },
        audit_note=text,
    )
