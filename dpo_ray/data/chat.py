"""Chat templates: from a conversation to the text that the model reads."""

from __future__ import annotations

from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_ray.errors import ConfigError

from .admission import Rejected
from .groups import Conversation, TextGroup

PLAIN = "plain"


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory, never running code from it.

    Raises:
        ConfigError: there is none, or it has no end-of-sequence token.
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
            fix="set eos_token in tokenizer_config.json: completions end with it",
        )
    return tokenizer


def resolve_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template's text, or `plain`, for the recipe's `data.chat_template`.

    Raises:
        ConfigError: `auto` and the tokenizer has none; no such file, or not UTF-8; not valid Jinja.
    """
    if choice == PLAIN:
        return PLAIN
    text = _own_template(tokenizer) if choice == "auto" else _template_file(choice)
    try:  # by transformers, which knows tags that Jinja does not, such as `generation`
        _apply(({"role": "user", "content": "x"},), text, tokenizer, add_generation_prompt=True)
    except Rejected:
        return text  # it is well formed; what it refuses, rows will tell
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"not a valid template: {error.message} (line {error.lineno})",
            where=f"data.chat_template={choice}",
            fix="correct the template",
        ) from None
    return text


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name; `default` is the one for conversations without tools
        template = template.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            "the tokenizer has no chat template",
            where="data.chat_template=auto",
            fix="set data.chat_template=plain for bare text, or the path of a Jinja template",
        )
    return template


def _template_file(choice: str) -> str:
    path = Path(choice)
    if not path.is_file():
        raise ConfigError(
            "no such template file", where=f"data.chat_template={choice}", fix="allowed: auto, plain, or a file's path"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=f"data.chat_template={choice}", fix="save it as UTF-8 text"
        ) from None


def render(group: TextGroup, template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """Render a group: the prompt's text, and for each completion the text of the whole conversation.

    Raises:
        Rejected: the template refuses the conversation, or the prompt is not how the whole begins.
    """
    if template == PLAIN:
        prompt = group.prompt if isinstance(group.prompt, str) else "".join(f"{m['content']}\n\n" for m in group.prompt)
        return prompt, [prompt + completion for completion in group.completions]
    turns = group.messages if group.messages is not None else group.prompt
    messages = ({"role": "user", "content": turns},) if isinstance(turns, str) else turns
    prompt = _apply(messages, template, tokenizer, add_generation_prompt=True)
    wholes = []
    for completion in group.completions:
        answer = {"role": "assistant", "content": completion.strip() if group.messages is not None else completion}
        whole = _apply((*messages, answer), template, tokenizer, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise Rejected("PREFIX_BROKEN", "the template renders the prompt otherwise once an answer follows")
        wholes.append(whole)
    return prompt, wholes


def _apply(
    messages: Conversation, template: str, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> str:
    try:  # transformers renders in Jinja's immutable sandbox
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateSyntaxError:
        raise  # the template's fault, not the row's: `resolve_template` has seen to it
    except Exception as error:  # a template is a program, and its row can make it raise anything
        raise Rejected("TEMPLATE_ERROR", f"{type(error).__name__}: {error}"[:200]) from None
    assert isinstance(text, str)  # noqa: S101 - tokenize=False
    return text
