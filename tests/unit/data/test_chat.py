"""Templates: which one is used, and that it renders what transformers renders."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup
from dpo_ray.data.tokenizing.chat import Rendered, Renderer, load_tokenizer, resolve_template, resolved
from dpo_ray.errors import ConfigError
from tests.unit.data.conftest import CHATML, template_process

TOOL_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <b>"}}}],
}
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},)
TOOL_TEMPLATE = (
    "{{- bos_token }}{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "<|im_start|>{{ m['role'] ~ '\n' }}"
    "{%- if m.tool_calls is defined and m.tool_calls %}\n"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n"
    "{%- else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}<|im_end|>{{ '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}\n<|im_start|>assistant{{ '\n' if not thinking else '\n<think>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chatml(chatml_dir: str):
    return load_tokenizer(chatml_dir)


def rendered(group: TextGroup, template: str, tokenizer, **config: Any) -> Rendered:
    data = DataConfig.model_validate({"train": "rows.jsonl", **config})
    (result,) = Renderer(template, tokenizer, data, template_process()).render([group])
    if isinstance(result, Rejected):
        raise result
    return result


def of_transformers(tokenizer, template: str | None, messages: list[dict], answer: dict, **variables: Any):
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
    )
    whole = tokenizer.apply_chat_template([*messages, answer], chat_template=template, tokenize=False, **variables)
    return prompt, whole


def test_rendering_is_that_of_transformers_with_tools_variables_and_tags(chatml):
    messages = [{"role": "user", "content": "Rain & <sun> in Zürich?"}]
    group = TextGroup(tuple(messages), (TOOL_CALL, "no"), (1.0, 0.0), tools=TOOLS, template_kwargs={"thinking": False})
    prompt, wholes = rendered(group, TOOL_TEMPLATE, chatml, chat_template_kwargs={"thinking": True, "other": 1})
    for answer, whole in zip((TOOL_CALL, {"role": "assistant", "content": "no"}), wholes, strict=True):
        expected = of_transformers(chatml, TOOL_TEMPLATE, messages, answer, tools=list(TOOLS), thinking=False)
        assert (prompt, whole) == expected
    assert "weather" in prompt
    assert "Zürich <b>" in wholes[0]  # JSON without escapes


def test_the_recipes_variables_hold_where_a_row_has_none(chatml):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '#' if thinking }}"
    group = TextGroup("Hi", ("yes", "no"), (1.0, 0.0))
    with pytest.raises(Rejected):  # with the variable, the template writes something behind the prompt
        rendered(group, template, chatml, chat_template_kwargs={"thinking": True})
    assert rendered(group, template, chatml).prompt == "Hi"


def test_a_template_that_asks_for_the_date_is_told_the_recipes(chatml):
    template = "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m.content }}{% endfor %}"
    group = TextGroup("Hi", ("yes", "no"), (1.0, 0.0))
    assert rendered(group, template, chatml).prompt == "26 Jul 2024: Hi"
    today = datetime.datetime.now().date()  # what transformers tells it
    assert rendered(group, template, chatml, chat_template_date=today.isoformat()).prompt == (
        chatml.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=template, tokenize=False)
    )


def test_of_templates_by_name_rows_with_tools_take_tool_use(chatml_dir: str):
    tokenizer = load_tokenizer(chatml_dir)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools! " + CHATML}
    assert resolve_template("auto", tokenizer) == CHATML
    messages = [{"role": "user", "content": "Hi"}]
    for tools in (None, TOOLS):
        group = TextGroup("Hi", ("yes", "no"), (1.0, 0.0), tools=tools)
        prompt, wholes = rendered(group, CHATML, tokenizer, rules={"dropped_content": "keep"})
        answer = {"role": "assistant", "content": "yes"}
        assert (prompt, wholes[0]) == of_transformers(tokenizer, None, messages, answer, tools=tools and list(tools))
        assert prompt.startswith("tools!") == (tools is not None)


def test_hh_text_becomes_messages_under_a_template_and_stays_text_without(chatml):
    group = TextGroup(
        "\n\nHuman: Hi\n\nAssistant:", (" yes", " no"), (1.0, 0.0), messages=({"role": "user", "content": "Hi"},)
    )
    assert rendered(group, CHATML, chatml) == rendered(TextGroup("Hi", ("yes", "no"), (1.0, 0.0)), CHATML, chatml)
    prompt, wholes = rendered(group, "plain", chatml)
    assert (prompt, wholes[0]) == ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: yes")


def test_a_lone_surrogate_is_found_wherever_it_comes_from(chatml):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "\ud800"}}]}
    for group, template in (
        (TextGroup("Hi", (call, "no"), (1.0, 0.0)), TOOL_TEMPLATE),
        (TextGroup("Hi", ("yes \ud800", "no"), (1.0, 0.0)), "plain"),
    ):
        with pytest.raises(Rejected) as caught:
            rendered(group, template, chatml)
        assert caught.value.reason == "INVALID_UTF8"


def test_tool_calls_have_no_plain_text(chatml):
    with pytest.raises(Rejected) as caught:
        rendered(TextGroup("Hi", (TOOL_CALL, "no"), (1.0, 0.0)), "plain", chatml)
    assert caught.value.reason == "DROPPED_BY_TEMPLATE"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system here') }}", "TEMPLATE_ERROR"),
        ("{{ messages[0].content.nothing.at_all }}", "TEMPLATE_ERROR"),
        ("{{ ''.__class__.__mro__ }}", "TEMPLATE_ERROR"),  # the sandbox
        ("{% set _ = messages.append(1) %}", "TEMPLATE_ERROR"),  # immutable
        ("{{ lipsum() }}", "TEMPLATE_ERROR"),
        ("{{ messages | length }}", "PREFIX_BROKEN"),
        ("{{ 'a' * 10**9 }}", "TEMPLATE_LIMIT"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "TEMPLATE_LIMIT"),
    ],
)
def test_a_row_that_cannot_be_rendered_says_why(template: str, reason: str, chatml):
    with pytest.raises(Rejected) as caught:
        rendered(TextGroup("Hi", ("yes", "no"), (1.0, 0.0)), template, chatml)
    assert caught.value.reason == reason
    assert caught.value.detail


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
    with pytest.raises(ConfigError, match="no such template file"):
        resolve_template("a" * 300, chatml)
    path.write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"the template is not valid.*line 1"):
        resolve_template(str(path), chatml)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_template(str(path), chatml)


def test_one_of_several_templates_is_chosen_by_name(chatml):
    chatml.chat_template = {"tool_use": CHATML, "rag": "{{ documents }}"}
    try:
        assert resolve_template("name:tool_use", chatml) == CHATML
        assert resolve_template("name:tool_use", None) == "name:tool_use"  # a hub model that is not on this machine yet
        assert resolved("name:tool_use", chatml) == resolved(CHATML, chatml) == CHATML
        with pytest.raises(ConfigError, match="has no chat template `default`; it has name:rag, name:tool_use"):
            resolve_template("auto", chatml)
        with pytest.raises(ConfigError, match="has no chat template `x`"):
            resolve_template("name:x", chatml)
    finally:
        chatml.chat_template = CHATML


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_unusable_tokenizer_is_a_config_error(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
