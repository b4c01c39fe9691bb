"""Renders chat templates, which convert a conversation to the text that the model reads."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_ray.config.data import NAMED_TEMPLATE, DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message, TextGroup
from dpo_ray.errors import ConfigError, DataError

from .dropped import REASONING, DropCheck, Tools
from .template_process import Answer, Asked, TemplateProcess
from .template_program import INVALID, LIMIT

P = ParamSpec("P")

PLAIN = "plain"
AUTO = "auto"
MAX_OVERRUNS = 20
"""How many rows of one task may exceed the limits of a template. Each such row costs a second, and there may be millions."""


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory, without running code that the directory contains.

    Raises:
        ConfigError: there is no tokenizer, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise ConfigError(
            f"there is no usable tokenizer: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            where=f"model.path={model_dir}",
            fix="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no eos_token",
            where=f"model.path={model_dir}",
            fix="set eos_token in tokenizer_config.json, because completions end with it",
        )
    return tokenizer


def resolve_template(choice: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the text of the template that the recipe's `data.chat_template` names. The choice `plain` is returned unchanged.

    `auto` and `name:NAME` are also returned unchanged if there is no tokenizer, because it was not downloaded yet.

    Raises:
        ConfigError: the tokenizer has no such template; the file is missing or not UTF-8; or the template is not valid
            Jinja, or exceeds a limit when it is compiled.
    """
    if choice == PLAIN or (is_unresolved(choice) and tokenizer is None):
        return choice
    own = None if tokenizer is None else tokenizer.chat_template
    text = _own_template(choice, own) if is_unresolved(choice) else _template_file(choice)
    with TemplateProcess() as process:
        for template in dict.fromkeys((text, _template_with_tools(text, tokenizer))):
            if fault := process.fault(template, datetime.date.min):
                raise _invalid(fault, choice)
    return text


def _invalid(fault: str, choice: str) -> ConfigError:
    where, fix = f"data.chat_template={choice}", "correct the template"
    return ConfigError(f"the template is not valid: {fault}", where=where, fix=fix)


def is_unresolved(template: str) -> bool:
    """Return whether `template` is `auto` or `name:NAME`: the name of a template of the tokenizer, and not yet its text."""
    return template == AUTO or NAMED_TEMPLATE.fullmatch(template) is not None


def resolved(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a template. If `template` is only the name of a template of the tokenizer, read and check it first."""
    return resolve_template(template, tokenizer) if is_unresolved(template) else template


def _own_template(choice: str, own: Any) -> str:
    templates = own if isinstance(own, dict) else {"default": own} if own else {}
    name = "default" if choice == AUTO else choice.partition(":")[2]  # `default`: for conversations without tools
    template = templates.get(name)
    if not isinstance(template, str):
        others = ", ".join(f"name:{each}" for each in sorted(templates))
        raise ConfigError(
            f"the tokenizer has no chat template `{name}`; it has {others}"
            if others
            else "the tokenizer has no chat template",
            where=f"data.chat_template={choice}",
            fix=f"set data.chat_template to one of {others}, or the path of a Jinja template"
            if others
            else "set data.chat_template=plain for bare text, or the path of a Jinja template",
        )
    return template


def _template_file(choice: str) -> str:
    path = Path(choice)
    if not os.path.isfile(path):  # unlike Path.is_file, without an error for a name that is too long
        raise ConfigError(
            "there is no such template file",
            where=f"data.chat_template={choice}",
            fix="set data.chat_template to auto, name:NAME, plain, or the path of a file",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the template file cannot be read: {error}",
            where=f"data.chat_template={choice}",
            fix="save the file as UTF-8 text",
        ) from None


def _template_with_tools(template: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the template for conversations with tools, as in transformers.

    This is the tokenizer's template `tool_use`, if there is one and `template` is the tokenizer's default template.
    Otherwise it is `template`.
    """
    own = None if tokenizer is None else tokenizer.chat_template
    return own.get("tool_use", template) if isinstance(own, dict) and own.get("default") == template else template


def template_variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the variables that every template gets: the special tokens by name, and `documents`, which is None."""
    return {"documents": None, **tokenizer.special_tokens_map}


class Rendered(NamedTuple):
    """The rendered prompt, and for each completion the complete rendered conversation, which begins with the prompt."""

    prompt: str
    wholes: list[str]


class Renderer:
    """Renders the preference groups of one task with one template. The template runs in a process with limits."""

    def __init__(
        self, template: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, process: TemplateProcess
    ) -> None:
        self.is_plain = template == PLAIN
        self._process, self._config = process, config
        self._templates = (template, _template_with_tools(template, tokenizer))
        self._variables = {**template_variables(tokenizer), **config.chat_template_kwargs}
        self._name = (
            "the tokenizer's chat template" if config.chat_template == AUTO else f"the template {config.chat_template}"
        )
        checked = config.rules.dropped_content == "quarantine"
        self._checks = (DropCheck(self._name), DropCheck(self._name)) if checked else None
        self._overruns = 0

    def render(self, groups: Sequence[TextGroup]) -> list[Rendered | Rejected]:
        """Render groups. Return one result per group, in order.

        A group is rejected if the template refuses the conversation, takes too long, or needs too much memory; if the
        whole conversation does not begin with the prompt; or if the text is not valid Unicode.

        Raises:
            ConfigError: the template is not valid.
            DataError: the template exceeded its limits for too many groups.
        """
        if self.is_plain:
            return [_or_rejected(self._plain, group) for group in groups]
        asked = [self._asked(group, _conversations(group)) for group in groups]
        answers = self._answers(asked)
        return [_or_rejected(self._checked, *three) for three in zip(groups, asked, answers, strict=True)]

    def user_turn(self) -> str:
        """Render a single user turn with the content `x`, to find out which tokens the template writes around a turn.

        Return "" if there is no template, or if the template raises an error.
        """
        if self.is_plain:
            return ""
        group = TextGroup("x", ("y",), (1.0,))
        try:
            return self._text(group, [{"role": "user", "content": "x"}], None)
        except Rejected:
            return ""

    def _plain(self, group: TextGroup) -> Rendered:
        if self._checks is not None:
            _check_plain(group)
        prompt = _plain_prompt(group)
        return Rendered(prompt, [_sound(prompt + _plain_text(completion)) for completion in group.completions])

    def _checked(self, group: TextGroup, asked: Asked, answer: Answer) -> Rendered:
        prompt, wholes, unseen = self._text_of(answer, 0), [], None
        for number, (messages, _) in enumerate(asked.conversations[1:], start=1):
            whole = self._text_of(answer, number)
            if not whole.startswith(prompt):
                raise Rejected("PREFIX_BROKEN", "the template renders the prompt differently if an answer follows it")
            if self._checks is not None:
                if unseen is None:  # the part of the prompt is the same for all completions
                    unseen = [message for message in messages[:-1] if message["content"].strip() not in prompt]
                again = functools.partial(self._text, group)
                check = self._checks[group.tools is not None].check
                check(messages, group.tools, whole, [*unseen, messages[-1]], again)
            wholes.append(_sound(whole))
        return Rendered(prompt, wholes)

    def _text(self, group: TextGroup, messages: Sequence[Message], tools: Tools) -> str:
        """Render one conversation with the variables of a group."""
        asked = self._asked(replace(group, tools=None if tools is None else tuple(tools)), [(messages, False)])
        return self._text_of(self._answers([asked])[0], 0)

    def _asked(self, group: TextGroup, texts: Sequence[tuple[Sequence[Message], bool]]) -> Asked:
        tools = None if group.tools is None else list(group.tools)
        return Asked(int(tools is not None), {**group.template_kwargs, "tools": tools}, texts)

    def _answers(self, asked: Sequence[Asked]) -> list[Answer]:
        answers: list[Answer] = []
        date = self._config.chat_template_date
        while len(answers) < len(asked):
            answers += self._process.render(self._templates, date, self._variables, asked[len(answers) :])
            self._overruns += answers[-1].end == LIMIT
            if self._overruns > MAX_OVERRUNS:
                raise DataError(
                    f"rendering exceeded a limit for more than {MAX_OVERRUNS} rows: {self._name} {answers[-1].detail}",
                    where=f"data.chat_template={self._config.chat_template}",
                    fix="correct the template, or remove the rows for which the template does too much work",
                )
        return answers

    def _text_of(self, answer: Answer, number: int) -> str:
        if number < len(answer.texts):
            return answer.texts[number]
        if answer.end == INVALID:
            raise _invalid(answer.detail, self._config.chat_template)
        if answer.end == LIMIT:
            raise Rejected("TEMPLATE_LIMIT", f"the template {answer.detail}")
        raise Rejected("TEMPLATE_ERROR", answer.detail)


def _or_rejected(render: Callable[P, Rendered], *args: P.args, **kwargs: P.kwargs) -> Rendered | Rejected:
    try:
        return render(*args, **kwargs)
    except Rejected as rejected:
        return rejected


def _conversations(group: TextGroup) -> list[tuple[Sequence[Message], bool]]:
    """List the conversations of a group: first the prompt, then the prompt with each answer.

    The bool is True for the prompt: the template then also writes the beginning of an answer (add_generation_prompt).
    """
    turns = group.messages if group.messages is not None else group.prompt
    messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)
    answers = [_answer(completion, strip=group.messages is not None) for completion in group.completions]
    return [(messages, True), *(([*messages, answer], False) for answer in answers)]


def _sound(text: str) -> str:
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:  # JSON can encode a lone surrogate, for instance in arguments of a tool call
        raise Rejected(
            "INVALID_UTF8", f"the rendered text contains a lone surrogate at character {error.start}"
        ) from None
    return text


def _check_plain(group: TextGroup) -> None:
    """Check that a group has nothing that plain text would leave out. Plain text consists of the content of each turn.

    Raises:
        Rejected: DROPPED_BY_TEMPLATE.
    """
    spoken = () if isinstance(group.prompt, str) else group.prompt
    messages = [*spoken, *(c for c in group.completions if not isinstance(c, str))]
    for key, part in (
        ("tool_calls", "tool calls"),
        ("name", "names of speakers"),
        *((k, "reasoning") for k in REASONING),
    ):
        if any(key in message for message in messages):
            raise Rejected(
                "DROPPED_BY_TEMPLATE", f"plain text cannot contain {part}: set data.chat_template to a template"
            )
    if group.tools:
        raise Rejected("DROPPED_BY_TEMPLATE", "plain text cannot contain tools: set data.chat_template to a template")


def _plain_prompt(group: TextGroup) -> str:
    if isinstance(group.prompt, str):
        return group.prompt
    return "".join(f"{_plain_text(message)}\n\n" for message in group.prompt)


def _plain_text(spoken: str | Mapping[str, Any]) -> str:
    if isinstance(spoken, str):
        return spoken
    if spoken.get("tool_calls"):
        raise Rejected("TEMPLATE_ERROR", "plain text cannot contain tool calls: set data.chat_template to a template")
    return spoken.get("content") or ""


def _answer(completion: str | Message, *, strip: bool) -> Message:
    """Build the assistant's message.

    `strip` removes the white space around a text. In a transcript this space belongs to the data format, not to the answer.
    """
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion.strip() if strip else completion}
    return completion
