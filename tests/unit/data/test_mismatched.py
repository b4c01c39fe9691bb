"""Completions of other prompts: whose they are, where they stand, and what they leave as it was."""

from __future__ import annotations

import math

import pyarrow as pa

from dpo_ray.config.data import DataConfig
from dpo_ray.data.keys import prepare_config
from dpo_ray.data.mismatched import with_mismatched
from dpo_ray.data.schemas import TOKENS

ROOM = 100


def group(number: int, prompt: list[int], *completions: list[int]) -> dict:
    return {
        "group_id": number.to_bytes(16, "big"),
        "source": "made",
        "prompt_ids": prompt,
        "completion_ids": list(completions),
        "scores": [float(len(completions) - k) for k in range(len(completions))],
        "chosen": [0][: len(completions) - 1],
        "rejected": [1][: len(completions) - 1],
        "preference_probability": 1.0,
        "weight": 1.0,
    }


def appended(rows: list[dict], room: int = ROOM) -> dict[int, list[int] | None]:
    """Return each group's completion of another prompt by the group's number, after checking that all else is unchanged."""
    found: dict[int, list[int] | None] = {}
    table = with_mismatched(pa.Table.from_pylist(rows, schema=TOKENS), room)
    assert table.schema == TOKENS
    for before, after in zip(rows, table.to_pylist(), strict=True):
        own = len(before["completion_ids"])
        assert after["completion_ids"][:own] == before["completion_ids"]
        assert after["scores"][:own] == before["scores"]
        others = {"completion_ids", "scores"}
        assert {k: v for k, v in after.items() if k not in others} == {
            k: v for k, v in before.items() if k not in others
        }
        extra = after["completion_ids"][own:]
        assert len(extra) <= 1
        assert [math.isnan(s) for s in after["scores"][own:]] == [True] * len(extra)
        found[int.from_bytes(after["group_id"], "big")] = extra[0] if extra else None
    return found


def test_each_group_gets_the_first_completion_of_the_next_by_group_id() -> None:
    rows = [group(3, [3], [33], [34]), group(1, [1], [11]), group(2, [2], [21], [22], [23])]
    assert appended(rows) == {1: [21], 2: [33], 3: [11]}
    assert appended(rows[::-1]) == {1: [21], 2: [33], 3: [11]}  # however the file lays them out


def test_the_same_prompt_is_passed_over_and_none_is_taken_where_there_is_no_other() -> None:
    same = [group(1, [7, 8], [11]), group(2, [7, 8], [21])]
    assert appended(same) == {1: None, 2: None}
    assert appended([*same, group(3, [9], [31])]) == {1: [31], 2: [31], 3: [11]}
    assert appended(same[:1]) == {1: None}
    assert appended([]) == {}


def test_what_does_not_fit_behind_the_prompt_is_passed_over() -> None:
    rows = [group(1, [1] * 5, [11]), group(2, [2], [21] * 5), group(3, [3], [31])]
    assert appended(rows, 9) == {1: [31], 2: [31], 3: [11]}
    assert appended(rows, 10) == {1: [21] * 5, 2: [31], 3: [11]}


def test_the_key_says_so_only_where_it_is_needed() -> None:
    data = DataConfig.model_construct(
        train=(), eval=None, rules=DataConfig.model_fields["rules"].get_default(call_default_factory=True)
    )
    plain = prepare_config((), (), data)
    assert prepare_config((), (), data, with_mismatched=True) == {**plain, "mismatched": True}
    assert "mismatched" not in plain
