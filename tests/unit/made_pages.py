"""What tests of pages share: a strict reader of HTML, and a made-up account of data."""

from __future__ import annotations

from html.parser import HTMLParser

import pyarrow as pa

from dpo_ray.account import measured_of
from dpo_ray.data.statistics import measure, merged
from dpo_ray.data.tokens import TOKENS
from dpo_ray.observe.data_page import DataPage, Example, LeftOut, Piece, RenderedCompletion, RenderedSample, RowCounts

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
                prompt=[Piece("<s>", special=True), Piece("Cook"), Piece(" an"), Piece(text)],
                completions=[
                    RenderedCompletion(
                        "chosen", "chosen", 3, [Piece(" Boil"), Piece("\n"), Piece("</s>", special=True)], 0, [], True
                    ),
                    RenderedCompletion("rejected", "rejected", 300, [Piece(text)], 298, [Piece(" so")], False),
                ],
            )
        ],
        max_length_tokens=138,
    )
