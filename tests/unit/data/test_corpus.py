"""The corpus of bad rows: each is quarantined for its reason, and its neighbours are as if it were not there.

A case of tests/corpus/rows.jsonl holds the reason, what is wrong (`why`), and the row (`row`, or `line_latin1` where it
is not JSON: its code points are the bytes). `data` is what of the recipe's section the case needs, `format` the
source's; `template` is `plain`, `chatml` (the default), or what comes before ChatML.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dpo_ray.data.admission import REASONS, sample_of
from dpo_ray.data.second_pass import broken_shards, check_quarantined
from dpo_ray.errors import DataError
from tests.helpers.corpus import BAD_SHARDS
from tests.unit.data.conftest import CHATML

CASES = [json.loads(line) for line in (Path(__file__).parents[2] / "corpus/rows.jsonl").read_text().splitlines()]
ELSEWHERE = {
    *(reason for reason in REASONS if reason.startswith(("SHARD_", "CSV_"))),  # test_broken_shards.py
    "TOO_LONG_BYTES",  # test_broken_shards.py
    "CONFLICTING_PAIR",  # test_stage.py, and the following: they take more than one row
    "LEAKED_PROMPT",
    "OVER_CAP",
    "OUTSIDE_MIXTURE",
    "FILTERED",  # test_filters.py
}
NEIGHBOURS = [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    {"chosen": "\n\nHuman: Well\n\nAssistant: good", "rejected": "\n\nHuman: Well\n\nAssistant: bad"},
]
AS_TEXT = [{"prompt": p, "chosen": " yes", "rejected": " no"} for p in ("Hi", "Well")]


def test_the_corpus_has_every_reason():
    assert {case["reason"] for case in CASES} == set(REASONS) - ELSEWHERE


@pytest.mark.parametrize("case", CASES, ids=[f"{c['reason']}-{c['why']}" for c in CASES])
def test_bad_row_is_quarantined_and_its_neighbours_are_untouched(case, prepare, jsonl, chatml_dir, builtin_dir):
    bad = case["line_latin1"].encode("latin-1") if "line_latin1" in case else case["row"]
    first, second = AS_TEXT if case.get("format") == "text" else NEIGHBOURS
    template = case.get("template", "chatml")
    settings = {
        "template": {"plain": "plain", "chatml": CHATML}.get(template, template + CHATML),
        "tokenizer_dir": builtin_dir if template == "plain" else chatml_dir,
        **case.get("data", {}),
    }
    source = {"format": case.get("format", "auto")}
    without = prepare({"path": jsonl([first, second], "without.jsonl"), **source}, **settings)
    prepared = prepare({"path": jsonl([first, bad, second], "with.jsonl"), **source}, **settings)
    assert prepared.reasons() == [case["reason"]]
    (row,) = prepared.quarantined()
    assert (row["ordinal"], row["source"], row["split"]) == (1, "with.jsonl", "train")
    assert [g["group_id"] for g in prepared.groups()] == [g["group_id"] for g in without.groups()]
    assert len(prepared.groups()) == 2


def test_the_whole_corpus_in_one_run(prepare, tmp_path, chatml_dir):
    """All bad rows that the default settings meet, a sound row before and after each, and all bad shards beside them."""
    cases = [c for c in CASES if not {"data", "format", "template"} & c.keys()]
    lines = [json.dumps(NEIGHBOURS[0] | {"chosen": "\n\nHuman: Hi\n\nAssistant: first"}).encode()]
    for i, case in enumerate(cases):
        lines.append(
            case["line_latin1"].encode("latin-1") if "line_latin1" in case else json.dumps(case["row"]).encode()
        )
        lines.append(json.dumps({"prompt": f"Sound {i}.", "chosen": "yes", "rejected": "no"}).encode())
    lines += [lines[-1]] * 3  # duplicates
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_bytes(b"\n".join(lines))
    for shard in BAD_SHARDS:
        shard.write(tmp_path / "data")
    prepared = prepare(str(tmp_path / "data"), tokenizer_dir=chatml_dir, template=CHATML)
    accounts = {a["source"]: a for a in prepared.artifact.manifest.figures["accounts"]}
    assert accounts["rows.jsonl"]["reasons"] == Counter(case["reason"] for case in cases)
    assert accounts["rows.jsonl"]["admitted"] == len(cases) + 1
    assert accounts["rows.jsonl"]["duplicates"] == 3
    for shard in BAD_SHARDS:
        assert accounts[shard.file]["reasons"] == Counter(shard.reasons), shard.file
        assert shard.sound_rows is None or accounts[shard.file]["admitted"] == shard.sound_rows, shard.file
    assert len(cases) >= 60
    assert len({c["reason"] for c in cases}) + len({s.kind for s in BAD_SHARDS}) >= 24 + 8
    told = broken_shards(prepared.artifact)
    assert len(told) == sum(any(r.startswith("SHARD_") for r in s.reasons) for s in BAD_SHARDS)
    with pytest.raises(DataError, match="are unsound"):
        check_quarantined(prepared.artifact, 0.01)


@pytest.mark.parametrize("row", [b"\xff\x1b[31m\n" * 99, {"k": "\ud800\x00\u202e" * 999}, "é" * 201, None, {1: [2]}])
def test_sample_is_short_and_printable(row: object):
    sample = sample_of(row)
    assert len(sample) <= 200
    assert sample.isprintable()
    assert sample.encode()


def test_sample_of_what_is_nested_beyond_str():
    row: list = []
    for _ in range(200_000):
        row = [row]
    assert "nested" in sample_of(row)
    while row:  # freed level by level: the interpreter's own way goes as deep as the nesting
        row = row.pop()
