"""Renders chat templates, which convert a conversation to the text that the model reads."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_ray.config.data import NAMED_TEMPLATE, DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message, TextGroup
from dpo_ray.errors import ConfigError

from .dropped import REASONING, DropCheck, Tools
from .sandbox import TextTooLong, compile_template
from .watchdog import Watchdog

PLAIN = "plain"
AUTO = "auto"
RENDER_SECONDS = 1.0  # CPU time for one text: a thousand times as long as long conversations need


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory, without running code that the directory contains.

    Raises:
        ConfigError: there is no tokenizer, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise ConfigError(
            f"no usable tokenizer: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
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
    """Return the template's text, or `plain`, for the recipe's `data.chat_template`.

    Without a tokenizer, because a hub model has not been downloaded yet, `auto` and `name:NAME` stay as they are.

    Raises:
        ConfigError: the tokenizer has no such template; the file is missing or not UTF-8; not valid Jinja.
    """
    if choice == PLAIN or (is_unresolved(choice) and tokenizer is None):
        return choice
    own = None if tokenizer is None else tokenizer.chat_template
    text = _own_template(choice, own) if is_unresolved(choice) else _template_file(choice)
    try:
        compile_template(text, datetime.date.min)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the template is not valid: {error.message} (line {error.lineno})",
            where=f"data.chat_template={choice}",
            fix="correct the template",
        ) from None
    return text


def is_unresolved(template: str) -> bool:
    """Return whether a template is one of the tokenizer's own that is named and not yet read."""
    return template == AUTO or NAMED_TEMPLATE.fullmatch(template) is not None


def resolved(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a template that was checked before the tokenizer's files were on this machine, or after."""
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
            "no such template file",
            where=f"data.chat_template={choice}",
            fix="allowed: auto, name:NAME, plain, or a file's path",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=f"data.chat_template={choice}", fix="save it as UTF-8 text"
        ) from None


class Rendered(NamedTuple):
    """The rendered prompt, and for each completion the rendered whole conversation, which begins with the prompt."""

    prompt: str
    wholes: list[str]


class Renderer:
    """Renders preference groups with one template, which is compiled once. The time and length of each text are limited."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.is_plain = template == PLAIN
        self._variables = {
            "documents": None,
            **tokenizer.special_tokens_map,
            **config.chat_template_kwargs,
        }
        own = tokenizer.chat_template
        name = (
            "the tokenizer's chat template" if config.chat_template == AUTO else f"the template {config.chat_template}"
        )
        self._checks = (DropCheck(name), DropCheck(name)) if config.rules.dropped_content == "quarantine" else None
        # if there are several named templates, transformers uses `tool_use` for conversations with tools
        with_tools = (
            own.get("tool_use", template) if isinstance(own, dict) and own.get("default") == template else template
        )
        self._render, self._render_with_tools = (
            None if self.is_plain else _compiled(text, config.chat_template_date) for text in (template, with_tools)
        )

    def render(self, group: TextGroup, watchdog: Watchdog) -> Rendered:
        """Render the prompt of a group, and the whole conversation with each completion.

        Raises:
            Rejected: the template raises an error, takes too long, produces too much text, or leaves out a part of the
                conversation; the rendered conversation does not begin with the rendered prompt; or the text is not valid
                Unicode.
        """
        if self.is_plain:
            if self._checks is not None:
                _check_plain(group)
            prompt = _plain_prompt(group)
            return Rendered(prompt, [_sound(prompt + _plain_text(completion)) for completion in group.completions])
        turns = group.messages if group.messages is not None else group.prompt
        messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)
        prompt = self._text(group, messages, watchdog, add_generation_prompt=True)
        wholes = []
        for completion in group.completions:
            answer = _answer(completion, strip=group.messages is not None)
            whole = self._text(group, [*messages, answer], watchdog, add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise Rejected("PREFIX_BROKEN", "the template renders the prompt differently if an answer follows it")
            if self._checks is not None:
                again = functools.partial(self._again, group, watchdog)
                self._checks[group.tools is not None].check([*messages, answer], group.tools, whole, again)
            wholes.append(_sound(whole))
        return Rendered(prompt, wholes)

    def _again(self, group: TextGroup, watchdog: Watchdog, messages: Sequence[Message], tools: Tools) -> str:
        changed = replace(group, tools=None if tools is None else tuple(tools))
        return self._text(changed, list(messages), watchdog, add_generation_prompt=False)

    def user_turn(self) -> str:
        """Render a single user turn with the content `x`, to find out which tokens the template writes around a turn.

        Return "" if there is no template, or if the template raises an error.
        """
        if self.is_plain:
            return ""
        group = TextGroup("x", ("y",), (1.0,))
        try:
            with Watchdog(RENDER_SECONDS) as watchdog:
                return self._text(group, [{"role": "user", "content": "x"}], watchdog, add_generation_prompt=False)
        except Rejected:
            return ""

    def _text(
        self, group: TextGroup, messages: list[Message], watchdog: Watchdog, *, add_generation_prompt: bool
    ) -> str:
        variables: dict[str, Any] = {
            **self._variables,
            **group.template_kwargs,
            "messages": messages,
            "tools": None if group.tools is None else list(group.tools),
            "add_generation_prompt": add_generation_prompt,
        }
        render = self._render if group.tools is None else self._render_with_tools
        assert render is not None  # noqa: S101 - not plain
        try:
            return watchdog.run(lambda: render(variables))
        except (TextTooLong, TimeoutError, MemoryError) as error:
            raise Rejected("TEMPLATE_LIMIT", f"the template {error}") from None
        except Exception as error:  # a template is a program, and a row can make it raise anything
            raise Rejected("TEMPLATE_ERROR", f"{type(error).__name__}: {error}"[:200]) from None


_compiled = functools.lru_cache(maxsize=8)(compile_template)


def _sound(text: str) -> str:
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:  # JSON can encode a lone surrogate, for instance in arguments of a tool call
        raise Rejected("INVALID_UTF8", f"the rendered text holds a lone surrogate at character {error.start}") from None
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
                "DROPPED_BY_TEMPLATE", f"plain text does not write {part}: data.chat_template must name a template"
            )
    if group.tools:
        raise Rejected(
            "DROPPED_BY_TEMPLATE", "plain text does not write tools: data.chat_template must name a template"
        )


def _plain_prompt(group: TextGroup) -> str:
    if isinstance(group.prompt, str):
        return group.prompt
    return "".join(f"{_plain_text(message)}\n\n" for message in group.prompt)


def _plain_text(spoken: str | Mapping[str, Any]) -> str:
    if isinstance(spoken, str):
        return spoken
    if spoken.get("tool_calls"):
        raise Rejected(
            "TEMPLATE_ERROR", "plain text has no way to write tool calls: data.chat_template must name a template"
        )
    return spoken.get("content") or ""


def _answer(completion: str | Message, *, strip: bool) -> Message:
    """Build the assistant's message.

    `strip` removes the white space around a text: in a transcript it belongs to the data format, not to the answer.
    """
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion.strip() if strip else completion}
    return completion
