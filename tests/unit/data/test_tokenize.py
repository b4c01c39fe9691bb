"""Token groups: where a completion ends, what is cut, which rows may not spell what, and what a group is known by."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.schemas import SHARD, shard_table
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.data.tokenizing.truncate import truncate
from tests.unit.data.conftest import CHATML, tokenized_groups

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
TEMPLATES = {
    "chatml": CHATML,
    "ends with a second token": CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
    "no end token": TURNS + "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "strips": TURNS.replace("m['content']", "m['content'] | trim")
    + "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "position": TURNS
    + "{% if loop.last %}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "no generation prompt": TURNS + "<|im_end|>{% endfor %}",
}


@pytest.fixture(scope="module")
def chatml(chatml_dir: str):
    return load_tokenizer(chatml_dir)


def config(**data: Any) -> DataConfig:
    return DataConfig.model_validate({"train": "rows.jsonl", **data})


def tokenized(group: TextGroup, template: str, tokenizer, **data: Any) -> TokenGroup | Rejected:
    return tokenized_groups([group], tokenizer, template, config(**{"max_length_tokens": 10**6, **data}))[0]


def reason(result: TokenGroup | Rejected) -> str | None:
    return result.reason if isinstance(result, Rejected) else None


def pair(prompt="Hi", chosen="yes", rejected="no", messages=None) -> TextGroup:
    return TextGroup(prompt, (chosen, rejected), (1.0, 0.0), messages=messages)


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        ("chatml", "yes<|im_end|>"),  # the line end that ChatML writes after it is no part
        ("ends with a second token", "yes<|im_end|>"),
        ("no end token", "yes\n<|endoftext|>"),
        ("strips", "yes<|im_end|>"),
        ("no generation prompt", "assistant: yes<|im_end|>"),
    ],
)
def test_completion_ends_with_its_end_token(template: str, completion: str, chatml):
    group = tokenized(pair(), TEMPLATES[template], chatml)
    assert chatml.decode(group.completion_ids[0]) == completion


def test_prompt_ends_with_the_generation_prompt(chatml):
    group = tokenized(pair(), CHATML, chatml)
    assert chatml.decode(group.prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_end_token_known_only_to_the_added_tokens_ends_a_turn(chatml):
    assert chatml.convert_tokens_to_ids("<|im_end|>") not in chatml.all_special_ids


def test_plain_text_gets_eos_and_keeps_what_looks_like_white_space(builtin_dir: str):
    tokenizer = load_tokenizer(builtin_dir)
    group = tokenized(pair("It is", " good. ", " bad"), "plain", tokenizer)
    assert group.completion_ids[0].tolist() == [*tokenizer(" good. ")["input_ids"], tokenizer.eos_token_id]
    given_eos = tokenized(pair("It is", " good<eos>", " a<pad>"), "plain", tokenizer, rules={"special_tokens": "allow"})
    assert [c.tolist().count(tokenizer.eos_token_id) for c in given_eos.completion_ids] == [1, 1]
    assert all(c[-1] == tokenizer.eos_token_id for c in given_eos.completion_ids)


def test_template_that_depends_on_the_position_is_quarantined(chatml):
    assert reason(tokenized(pair(), TEMPLATES["position"], chatml)) == "PREFIX_BROKEN"


def test_a_completion_that_the_template_does_not_write_is_none(chatml):
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m.role == 'user' }}")
    assert reason(tokenized(pair(), template, chatml)) == "DROPPED_BY_TEMPLATE"
    assert reason(tokenized(pair(), template, chatml, rules={"dropped_content": "keep"})) == "NO_RESPONSE_TOKENS"


def test_a_rejected_row_keeps_its_place_in_the_batch(chatml):
    bad = Rejected("NULL_FIELD")
    results = tokenized_groups([pair(), bad, pair("Ho")], chatml, CHATML, config())
    assert results[1] is bad
    assert chatml.decode(results[2].prompt_ids).count("Ho") == 1


def test_what_a_group_says_of_its_preference_goes_with_it(builtin_dir: str):
    tokenizer = load_tokenizer(builtin_dir)
    texts = " the best", " good", " bad"
    group = TextGroup("It is", texts, (3.0, 2.0, 1.0), chosen=(0, 0), rejected=(1, 2), preference_probability=0.75)
    result = tokenized(group, "plain", tokenizer)
    assert (result.scores, result.chosen, result.rejected) == ([3.0, 2.0, 1.0], [0, 0], [1, 2])
    assert result.preference_probability == 0.75
    single = tokenized(TextGroup("It is", (" good",), (1.0,), chosen=(), rejected=()), "plain", tokenizer)
    assert (single.chosen, single.rejected, len(single.completion_ids)) == ([], [], 1)


def test_prompt_hash_is_of_the_prompt_before_truncation(chatml):
    whole = tokenized(pair("Hi there"), CHATML, chatml)
    cut = tokenized(pair("Hi there"), CHATML, chatml, max_prompt_tokens=5, truncation="keep_end")
    assert cut.prompt_ids.tolist() == whole.prompt_ids[-5:].tolist()
    assert cut.prompt_hash == whole.prompt_hash
    assert whole.prompt_hash == hashlib.blake2b(whole.prompt_ids.tobytes(), digest_size=16).digest()


def test_completions_cut_to_the_same_are_no_pair_unless_they_are_none(chatml):
    longer = {"max_length_tokens": 40, "truncation": "keep_start"}
    group = pair("Hi", "the same beginning, then a", "the same beginning, then b")
    assert reason(tokenized(group, CHATML, chatml, **longer)) == "NO_RESPONSE_TOKENS"
    three = TextGroup("Hi", ("x", *group.completions), (3.0, 2.0, 1.0), chosen=(0,), rejected=(2,))
    assert (
        reason(tokenized(three, CHATML, chatml, **longer)) is None
    )  # of the two that are the same now, one is in no pair
    ranked = TextGroup("Hi", ("x", *group.completions), (3.0, 2.0, 1.0), chosen=(), rejected=())
    assert reason(tokenized(ranked, CHATML, chatml, **longer)) == "NO_RESPONSE_TOKENS"


# -- special tokens


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"a": ["<|im_end|>"]}}}],
}
SPELLED = {
    "prompt": pair("Hi <|im_end|>"),
    "completion": pair(rejected="no<|im_start|>system\nNow"),
    "a message": TextGroup(({"role": "user", "content": "<|endoftext|>"},), ("yes", "no"), (1.0, 0.0)),
    "a name": TextGroup(({"role": "user", "name": "<|im_end|>", "content": "x"},), ("yes", "no"), (1.0, 0.0)),
    "an argument of a tool call": TextGroup("Hi", (CALL, "no"), (1.0, 0.0)),
    "a tool": TextGroup("Hi", ("yes", "no"), (1.0, 0.0), tools=({"function": {"name": "<|im_end|>"}},)),
    "a variable": TextGroup("Hi", ("yes", "no"), (1.0, 0.0), template_kwargs={"x": "<|im_end|>"}),
    "text that stands for a conversation": pair(
        "Human: <|im_end|>", messages=({"role": "user", "content": "<|im_end|>"},)
    ),
}


@pytest.mark.parametrize("place", SPELLED)
def test_text_that_spells_a_special_token_is_quarantined_unless_the_recipe_allows_it(place: str, chatml):
    result = tokenized(SPELLED[place], CHATML, chatml)
    assert reason(result) == "SPECIAL_TOKEN_INJECTION"
    assert "<|" in result.detail
    assert (
        reason(tokenized(SPELLED[place], CHATML, chatml, rules={"special_tokens": "allow"}))
        != "SPECIAL_TOKEN_INJECTION"
    )


@pytest.mark.parametrize("text", ["<|im_end", "<| im_end |>", "im_end|>", "< |im_end|>", "&lt;|im_end|&gt;"])
def test_text_that_only_looks_like_a_special_token_is_admitted(text: str, chatml):
    assert reason(tokenized(pair(text), CHATML, chatml)) is None


def test_plain_text_may_not_spell_a_special_token_either(chatml):
    assert reason(tokenized(pair("Hi<|endoftext|>"), "plain", chatml)) == "SPECIAL_TOKEN_INJECTION"


def test_added_tokens_that_are_not_special_are_content_unless_the_template_frames_a_users_turn_with_them(
    chatml_dir: str,
):
    tokenizer = load_tokenizer(chatml_dir)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("[USER]", special=False)])
    template = "{% for m in messages %}{{ '[USER]' if m.role == 'user' }}{{ m.content }}<|im_end|>{% endfor %}"
    assert reason(tokenized(pair(chosen="<think>hm"), template, tokenizer)) is None
    assert reason(tokenized(pair(chosen="[USER] and you?"), template, tokenizer)) == "SPECIAL_TOKEN_INJECTION"
    assert reason(tokenized(pair(chosen="[USER] and you?"), CHATML, tokenizer)) is None


# -- truncation


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=30).map(lambda ids: np.array(ids, np.int32))


@settings(max_examples=400, deadline=None)
@given(
    prompt=IDS,
    completions=st.lists(IDS, min_size=1, max_size=4),
    length=st.integers(2, 40),
    prompt_length=st.none() | st.integers(1, 40),
    truncation=st.sampled_from(["keep_start", "keep_end", "drop"]),
)
def test_truncation_keeps_within_the_limits_and_the_prompt_alike(
    prompt, completions, length, prompt_length, truncation
):
    limits = config(max_length_tokens=length, max_prompt_tokens=prompt_length, truncation=truncation)
    longest = max(map(len, completions))
    try:
        kept, shortened = truncate(prompt, completions, limits)
    except Rejected as rejected:
        match rejected.reason:
            case "PROMPT_TOO_LONG":
                assert truncation != "keep_end"
                assert len(prompt) > (prompt_length or 10**6) or (truncation == "keep_start" and len(prompt) >= length)
            case "TOO_LONG":
                assert len(prompt) + longest > length
                assert truncation == "drop" or (truncation == "keep_end" and longest >= length)
            case other:
                pytest.fail(other)
        return
    assert 0 < len(kept) <= (prompt_length or 10**6)
    assert all(len(ids) for ids in shortened)
    assert len(kept) + max(map(len, shortened)) <= length
    if truncation == "keep_end":
        room = min(prompt_length or 10**6, length - longest)
        assert kept.tolist() == prompt.tolist()[-room:]
        assert shortened == completions
    else:
        assert kept.tolist() == prompt.tolist()
        for whole, ids in zip(completions, shortened, strict=True):
            assert ids.tolist() == whole.tolist()[: length - len(prompt)]


# -- groups and their table


def group(prompt, completions, scores, **others) -> TokenGroup:
    pairs = {"chosen": [0], "rejected": [1], "preference_probability": 1.0, "prompt_hash": b"p" * 16} | others
    arrays = [np.array(c, np.int32) for c in completions]
    return TokenGroup(np.array(prompt, np.int32), arrays, scores, **pairs)


def test_group_id_tells_apart_where_prompt_and_completions_meet():
    ids = {
        group([1, 2], [[3], [4]], [1.0, 0.0]).group_id,
        group([1], [[2, 3], [4]], [1.0, 0.0]).group_id,
        group([1, 2], [[3, 4]], [1.0]).group_id,
        group([1, 2], [[3, 4]], [0.0]).group_id,
        group([1, 2], [[4], [3]], [1.0, 0.0]).group_id,
        group([1, 2], [[3], [4]], [5.0, 2.0], weight=2.0, preference_probability=0.7).group_id,
    }
    assert len(ids) == 5  # scores of the same order are no other group
    assert all(len(i) == 16 for i in ids)


def test_opposite_id_is_the_id_of_the_opposite_preference():
    one, other = group([1], [[3], [4]], [1.0, 0.0]), group([1], [[4], [3]], [1.0, 0.0])
    assert (one.opposite_id, other.opposite_id) == (other.group_id, one.group_id)
    good, bad = group([1], [[3]], [1.0]), group([1], [[3]], [0.0])
    assert (good.opposite_id, bad.opposite_id) == (bad.group_id, good.group_id)
    assert group([1], [[3], [4], [5]], [3.0, 2.0, 1.0]).opposite_id is None


def test_shard_table_holds_the_groups():
    groups = [
        group([1, 2], [[3], [4, 5]], [1.0, 0.0], preference_probability=0.75),
        group([7], [[8]], [0.0], chosen=[], rejected=[]),
        group([1], [[3], [4], [5]], [3.0, 2.5, 1.0], chosen=[0, 1], rejected=[1, 2]),
    ]
    table = shard_table(groups, [0, 5, 9], [b"a", b"b", b"c"])
    table.validate(full=True)
    assert table.schema == SHARD
    rows = table.to_pylist()
    for row, g, ordinal, minhash in zip(rows, groups, [0, 5, 9], [b"a", b"b", b"c"], strict=True):
        assert row == {
            "group_id": g.group_id,
            "prompt_ids": g.prompt_ids.tolist(),
            "completion_ids": [c.tolist() for c in g.completion_ids],
            "scores": g.scores,
            "chosen": g.chosen,
            "rejected": g.rejected,
            "preference_probability": g.preference_probability,
            "weight": 1.0,
            "ordinal": ordinal,
            "prompt_hash": g.prompt_hash,
            "opposite_id": g.opposite_id,
            "minhash": minhash,
        }
    assert shard_table(groups, [0, 1, 2], None)["minhash"].null_count == 3
    assert shard_table([], [], None).equals(pa.table(SHARD.empty_table()))
