"""Prompts of a source of their own: the ids that preference data of the same prompt has, with the row's answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_ray.config.data import DataConfig
from dpo_ray.config.model import ModelConfig
from dpo_ray.data.first_pass import PrepareTask
from dpo_ray.data.sources import list_shards
from dpo_ray.models.load import model_directory
from dpo_ray.online.prompt_source import _read

CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def read(tmp_path: Path, rows: list[object], template: str = "plain"):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    data = DataConfig.model_validate({"train": "synthetic", "chat_template": "plain"})
    (shard,) = list_shards("prompts", DataConfig.model_validate({"train": str(file)}).train)
    directory = str(model_directory(ModelConfig(path="builtin:sentiment_llama")))
    table, reasons, count = _read(shard, PrepareTask(directory, template, data))
    return table.to_pylist(), dict(reasons), count


def test_every_usual_column_of_prompts_and_answers_is_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Two and two?", "answer": 4},
        {"question": "Two and two?", "solution": "four"},
        {"instruction": "Two and two?"},
        {"prompt": [{"role": "user", "content": "Two and two?"}], "ground_truth": "4"},
        {"prompt": "Two and two?", "chosen": " 4", "rejected": " 5"},
    ]
    found, reasons, count = read(tmp_path, rows)
    assert (len(found), reasons, count) == (5, {}, 5)
    assert [row["answer"] for row in found] == ["4", "four", None, "4", None]
    assert found[0]["prompt_ids"] == found[1]["prompt_ids"] == found[2]["prompt_ids"] == found[4]["prompt_ids"]


def test_a_template_writes_the_turn_that_is_to_be_answered(tmp_path: Path) -> None:
    from dpo_ray.data.tokenizing.chat import load_tokenizer

    found, _, _ = read(tmp_path, [{"prompt": "Who?"}], CHAT)
    tokenizer = load_tokenizer(str(model_directory(ModelConfig(path="builtin:sentiment_llama"))))
    assert found[0]["prompt_ids"] == tokenizer("[user] Who?\n[assistant] ", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "JSON_SYNTAX"),
        ("[1]", "NOT_AN_OBJECT"),
        ({"text": "x"}, "MISSING_PROMPT"),
        ({"prompt": None}, "NULL_FIELD"),
        ({"prompt": 3}, "WRONG_TYPE"),
    ],
)
def test_a_bad_row_has_a_reason_and_its_neighbours_stay(tmp_path: Path, row: object, reason: str) -> None:
    found, reasons, count = read(tmp_path, [{"prompt": "One"}, row, {"prompt": "Two"}])
    assert (len(found), reasons, count) == (2, {reason: 1}, 3)
