"""Compiles chat templates with Jinja in the same sandbox as transformers.

Only `template_program` may use it, as that process has limits of time and memory.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

MAX_CHARACTERS = 16 * 2**20
"""The maximum length of a rendered text, in characters: a few million tokens, more than any model's context."""


class TextTooLong(Exception):
    """Raised if a template produced more text than allowed."""


def compile_template(text: str, date: datetime.date) -> Callable[[Mapping[str, Any]], str]:
    """Compile a chat template to a function from its variables to text.

    In the template, `strftime_now` formats `date`. Compiling evaluates constant expressions, so it can take as long as
    rendering. The returned function raises TextTooLong, and any exception that the template raises.

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid.
    """
    template = _environment(date).from_string(text)
    start, shared = template.root_render_func, dict(template.globals)

    def render(variables: Mapping[str, Any]) -> str:
        context = jinja2.runtime.Context(template.environment, {**shared, **variables}, template.name, template.blocks)
        rendered = "".join(start(context))
        if len(rendered) > MAX_CHARACTERS:
            raise TextTooLong(f"wrote more than {MAX_CHARACTERS:,} characters")
        return rendered

    return render


@functools.lru_cache(maxsize=8)
def _environment(date: datetime.date) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    midnight = datetime.datetime.combine(date, datetime.time())
    environment.globals["strftime_now"] = lambda layout: midnight.strftime(layout)
    del environment.globals["lipsum"]  # produces random text of any length
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert a value to JSON without Jinja's HTML escapes, as templates expect it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(jinja2.ext.Extension):
    """Adds the block `{% generation %}` to Jinja, which marks the assistant's text in some templates. Its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way of declaring them

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()
