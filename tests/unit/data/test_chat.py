"""Templates: what is prompt, what is completion, and where a completion ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ray.data.admission import Rejected
from dpo_ray.data.chat import load_tokenizer, render, resolve_template
from dpo_ray.data.groups import TextGroup
from dpo_ray.data.tokenize import TokenGroup, tokenize_groups, truncate
from dpo_ray.errors import ConfigError

from .conftest import CHATML

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


def tokenized(group: TextGroup, template: str, tokenizer, length: int = 10**6, truncation="keep_start"):
    return tokenize_groups([group], tokenizer, template, length, truncation)[0]


def pair(prompt="Hi", chosen="yes", rejected="no", messages=None) -> TextGroup:
    return TextGroup(prompt, (chosen, rejected), (1.0, 0.0), messages)


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
    assert group.completion_ids[0] == [*tokenizer(" good. ")["input_ids"], tokenizer.eos_token_id]
    given_eos = tokenized(pair("It is", " good<eos>", " a<pad>"), "plain", tokenizer)
    assert [c.count(tokenizer.eos_token_id) for c in given_eos.completion_ids] == [1, 1]
    assert all(c[-1] == tokenizer.eos_token_id for c in given_eos.completion_ids)


def test_template_that_depends_on_the_position_is_quarantined(chatml):
    rejected = tokenized(pair(), TEMPLATES["position"], chatml)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "PREFIX_BROKEN"


def test_hh_text_becomes_messages_under_a_template_and_stays_text_without(chatml):
    messages = ({"role": "user", "content": "Hi"},)
    group = pair("\n\nHuman: Hi\n\nAssistant:", " yes", " no", messages)
    assert render(group, CHATML, chatml) == render(pair(), CHATML, chatml)
    prompt, wholes = render(group, "plain", chatml)
    assert (prompt, wholes[0]) == ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: yes")


def test_a_rejected_row_keeps_its_place_in_the_batch(chatml):
    bad = Rejected("NULL_FIELD")
    results = tokenize_groups([pair(), bad, pair("Ho")], chatml, CHATML, 99, "drop")
    assert results[1] is bad
    assert chatml.decode(results[2].prompt_ids).count("Ho") == 1


def test_template_choices(tmp_path: Path, chatml, builtin_dir: str):
    assert resolve_template("auto", chatml) == CHATML
    assert resolve_template("plain", chatml) == "plain"
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}")
    assert resolve_template(str(path), chatml) == path.read_text()
    with pytest.raises(ConfigError, match="no chat template"):
        resolve_template("auto", load_tokenizer(builtin_dir))
    with pytest.raises(ConfigError, match="no such template file"):
        resolve_template("chatml", chatml)
    path.write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"not a valid template.*line 1"):
        resolve_template(str(path), chatml)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_template(str(path), chatml)


def test_default_of_several_templates(chatml_dir: str):
    tokenizer = load_tokenizer(chatml_dir)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
    assert resolve_template("auto", tokenizer) == CHATML


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_unusable_tokenizer_is_a_config_error(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


WORDS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n<|im_end|>"), min_size=1, max_size=20)
SPOKEN = WORDS.filter(lambda text: text.strip())
MESSAGES = st.lists(st.builds(dict, role=st.sampled_from(["user", "system"]), content=WORDS), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, completions=st.lists(SPOKEN, min_size=2, max_size=2), name=st.sampled_from(list(TEMPLATES)))
def test_ids_are_those_of_the_rendered_whole(messages, completions, name, chatml):
    group = TextGroup(tuple(messages), tuple(completions), (1.0, 0.0))
    result = tokenized(group, TEMPLATES[name], chatml)
    if isinstance(result, Rejected):
        assert result.reason in ("PREFIX_BROKEN", "NO_RESPONSE_TOKENS")
        return
    for completion, ids in zip(completions, result.completion_ids, strict=True):
        conversation = [*messages, {"role": "assistant", "content": completion}]
        whole = chatml.apply_chat_template(conversation, chat_template=TEMPLATES[name], tokenize=False)
        expected = chatml(whole, add_special_tokens=False)["input_ids"]
        ours = result.prompt_ids + ids
        if ours[: len(expected)] == expected:
            assert ours[len(expected) :] in ([], [chatml.eos_token_id])
        else:
            assert expected[: len(ours)] == ours
            after = chatml.decode(expected[len(ours) :])
            assert not after.replace("<|endoftext|>", "").replace("<|im_end|>", "").strip()
        assert ids[-1] in (chatml.eos_token_id, chatml.convert_tokens_to_ids("<|im_end|>")) or ids[-1] == expected[-1]


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    prompt=IDS,
    completions=st.lists(IDS, min_size=1, max_size=4),
    length=st.integers(2, 40),
    truncation=st.sampled_from(["keep_start", "keep_end", "drop"]),
)
def test_truncation_keeps_within_the_length_and_the_prompt_alike(prompt, completions, length, truncation):
    longest = len(prompt) + max(map(len, completions))
    room = {"keep_start": len(prompt), "keep_end": max(map(len, completions)), "drop": length}[truncation] < length
    if longest > length and not room:
        with pytest.raises(Rejected) as caught:
            truncate(prompt, completions, length, truncation)
        assert caught.value.reason == ("TOO_LONG" if truncation == "drop" else "NO_RESPONSE_TOKENS")
        return
    kept, shortened = truncate(prompt, completions, length, truncation)
    assert kept
    assert all(shortened)
    assert max(len(kept) + len(c) for c in shortened) == min(longest, length)
    if truncation == "keep_end":
        assert prompt[len(prompt) - len(kept) :] == kept
        assert shortened == completions
    else:
        assert kept == prompt
        assert all(whole[: len(c)] == c for whole, c in zip(completions, shortened, strict=True))


def test_group_id_tells_apart_where_prompt_and_completions_meet():
    ids = {
        TokenGroup([1, 2], [[3], [4]], [1.0, 0.0]).group_id,
        TokenGroup([1], [[2, 3], [4]], [1.0, 0.0]).group_id,
        TokenGroup([1, 2], [[3, 4]], [1.0]).group_id,
        TokenGroup([1, 2], [[4], [3]], [1.0, 0.0]).group_id,
        TokenGroup([1, 2], [[3], [4]], [0.0, 1.0]).group_id,
        TokenGroup([1, 2], [[3], [4]], [1.0, 0.0], weight=2.0).group_id,
    }
    assert len(ids) == 6
    assert all(len(i) == 16 for i in ids)
