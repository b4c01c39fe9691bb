"""Where an answer ends, and where sampling stops: by what the template writes, never by what some rows end with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from dpo_ray.config.data import DataConfig
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.data.tokenizing.tokenize import stop_tokens
from tests.unit.data.conftest import tokenized_groups

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
CONFIG = DataConfig.model_validate({"train": "rows.jsonl", "rules": {"special_tokens": "allow"}})


@pytest.fixture(scope="module")
def tokenizer(chatml_dir: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer that also has a special token which ends a thought, not an answer."""
    tokenizer = load_tokenizer(chatml_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, TWO_ENDS])
@pytest.mark.parametrize("answer", ["yes", "<think> no </think> yes", "a thought that was cut</think>"])
def test_an_answer_ends_where_the_template_ends_it(
    template: str, answer: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    (group,) = tokenized_groups([TextGroup("Hi", (answer, "no"), (1.0, 0.0))], tokenizer, template, CONFIG)
    assert isinstance(group, TokenGroup)
    assert tokenizer.decode(group.completion_ids[0]) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, TWO_ENDS])
def test_sampling_stops_at_the_end_of_a_turn_and_of_a_text(
    template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    stops = stop_tokens(tokenizer, template, CONFIG, tmp_path)
    assert set(tokenizer.convert_ids_to_tokens(stops)) == {"<|im_end|>", "<|endoftext|>"}


@pytest.mark.parametrize(("given", "added"), [(5, [5]), ([5, 7], [5, 7]), (None, []), ("7", []), ([True, -1], [])])
def test_the_ends_of_generation_config_count_as_well(
    given: object, added: list[int], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = stop_tokens(tokenizer, CHATML, CONFIG, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert set(stop_tokens(tokenizer, CHATML, CONFIG, tmp_path)) == {*own, *added}


def test_plain_text_stops_at_eos_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert stop_tokens(tokenizer, "plain", CONFIG, tmp_path) == (tokenizer.eos_token_id,)


def test_a_template_that_refuses_a_bare_question_leaves_eos(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    demanding = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system text, please') }}{% endif %}" + CHATML
    )
    assert stop_tokens(tokenizer, demanding, CONFIG, tmp_path) == (tokenizer.eos_token_id,)
