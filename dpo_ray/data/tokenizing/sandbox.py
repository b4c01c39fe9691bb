"""Compiles chat templates with Jinja, in the same sandbox as transformers, and limits the length of texts.

Some operations (repeating, joining, padding, powers) could produce gigabytes in one step. The size of their result is
computed before the result is built. `watchdog` stops endless loops. This protects against faulty templates and rows. It
does not protect against a template that was written to attack the machine.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

MAX_CHARACTERS = 16 * 2**20
"""The limit for a rendered text and for any intermediate text: a few million tokens, more than any model's context."""

MAX_INTEGER_BITS = 2**16


class TextTooLong(Exception):
    """Raised if a template has produced, or would produce, more text than allowed."""


def compile_template(text: str, date: datetime.date) -> Callable[[Mapping[str, Any]], str]:
    """Compile a chat template to a function that takes the template's variables and returns the rendered text.

    The template's function `strftime_now` formats `date`. The returned function raises TextTooLong, and any exception
    that the template raises.

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid.
    """
    template = _environment(date).from_string(text)
    start = template.root_render_func
    # `a ~ b` is compiled to a call of this name, which the environment cannot replace
    start.__globals__["str_join"] = lambda pieces: _concat(map(str, pieces))
    shared = dict(template.globals)

    def render(variables: Mapping[str, Any]) -> str:
        context = jinja2.runtime.Context(template.environment, {**shared, **variables}, template.name, template.blocks)
        return _concat(start(context))

    return render


@functools.lru_cache(maxsize=8)
def _environment(date: datetime.date) -> jinja2.Environment:
    environment = _BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    for name in ("center", "format", "indent", "join", "replace"):
        environment.filters[name] = _bounded_filter(name, environment.filters[name])
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
    if isinstance(indent, int) and indent > 100:
        raise TextTooLong(f"uses an indentation of {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(jinja2.ext.Extension):
    """Adds the block `{% generation %}` to Jinja, with which some templates mark the assistant's text. It renders its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way of declaring them

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def _concat(pieces: Iterable[str]) -> str:
    kept, characters = [], 0
    for piece in pieces:
        characters += len(piece)
        if characters > MAX_CHARACTERS:  # the same as `_check`, without a call for each piece
            raise TextTooLong(f"writes more than {MAX_CHARACTERS:,} characters")
        kept.append(piece)
    return "".join(kept)


_MEASURED = (str, list, tuple)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles a sum that is printed, `{{ a + b }}`, to Python's `+`, without a check: `_concat` checks what is printed.

    A sum that is stored in a variable is still checked (`call_binop`), since it can double with each iteration of a loop.
    """

    def visit_Output(self, node: jinja2.nodes.Output, frame: Any) -> None:
        self._written_out = frozenset(id(part) for child in node.nodes for part in _summands(child))
        super().visit_Output(node, frame)

    def visit_Add(self, node: jinja2.nodes.Add, frame: Any) -> None:
        if id(node) not in self._written_out:
            super().visit_Add(node, frame)
            return
        self.write("(")
        self.visit(node.left, frame)
        self.write(" + ")
        self.visit(node.right, frame)
        self.write(")")

    _written_out: frozenset[int] = frozenset()


def _summands(node: jinja2.nodes.Expr) -> Iterator[jinja2.nodes.Expr]:
    """Yield an expression and, if it is a sum, all its summands."""
    yield node
    if isinstance(node, jinja2.nodes.Add):
        yield from _summands(node.left)
        yield from _summands(node.right)


class _BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandboxed Jinja environment that limits the size of the results of operators and of text methods."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _CodeGenerator
    concat = staticmethod(_concat)  # type: ignore[assignment]

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":  # the most frequent operator; a sum at most doubles, so it can be measured afterwards
            result = left + right
            if isinstance(result, _MEASURED) and len(result) > MAX_CHARACTERS:
                raise TextTooLong(f"writes more than {MAX_CHARACTERS:,} characters")
            return result
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_INTEGER_BITS:
                raise TextTooLong("computes a power with too many digits")
        elif isinstance(left, str):
            _check(_grown("format", left, right if isinstance(right, tuple) else (right,)))
        return self.binop_table[operator](left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        text = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # `format` is wrapped by Jinja's sandbox
        if isinstance(text, str):
            _check(_grown(getattr(obj, "__name__", ""), text, (*args, *kwargs.values())))
        return super().call(context, obj, *args, **kwargs)


def _bounded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a Jinja filter so that the size of its result is checked before it runs.

    The value to filter is the first argument, or the second if the first is Jinja's evaluation context.
    """
    first = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @functools.wraps(filter_)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value, others = args[first], (*args[first + 1 :], *kwargs.values())
        if name == "join":  # here the pieces come first, and the separator follows
            value = list(value)
            args = (*args[:first], value, *args[first + 1 :])
            separator = next((o for o in others if isinstance(o, str)), "")
            _check(_grown(name, separator, (value,)))
        else:
            _check(_grown(name, str(value), others))
        return filter_(*args, **kwargs)

    return checked


_NUMBER = re.compile(r"\d+")


def _grown(method: str, text: str, args: tuple[Any, ...]) -> int:
    """Return an upper bound for the length of the text that a method returns; 0 if it cannot be longer than its input."""
    widths = [a for a in args if isinstance(a, int)]
    texts = [a for a in args if isinstance(a, str)]
    match method:
        case "center" | "ljust" | "rjust" | "zfill":
            return max(widths, default=0)
        case "expandtabs":
            return text.count("\t") * max(widths, default=8)
        case "indent":
            return (text.count("\n") + 1) * max((*widths, *map(len, texts)), default=4)
        case "replace":
            return text.count(texts[0]) * len(texts[1]) if len(texts) > 1 else 0
        case "join":
            pieces = args[0] if args and isinstance(args[0], list | tuple) else ()
            return len(text) * len(pieces) + sum(len(p) for p in pieces if isinstance(p, str))
        case "translate":
            table = args[0] if args and isinstance(args[0], Mapping) else {}
            return len(text) * max((len(v) for v in table.values() if isinstance(v, str)), default=0)
        case "format" | "format_map":
            return _formatted(text, args)
    return 0


def _formatted(text: str, args: tuple[Any, ...]) -> int:
    """Return an upper bound for the length that formatting adds to a text.

    It is the largest width in the format, plus the length of the longest argument for each placeholder.
    """
    values = [v for a in args for v in (a.values() if isinstance(a, Mapping) else (a,))]
    widths = [int(n[:12]) for n in _NUMBER.findall(text)] + [v for v in values if isinstance(v, int)]
    places = text.count("{") + text.count("%")
    return max([0, *widths]) + places * max((len(v) for v in values if isinstance(v, str)), default=0)


def _check_product(left: Any, right: Any) -> None:
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, str | list | tuple) and isinstance(times, int):
            _check(len(repeated) * times)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
        raise TextTooLong("computes a product with too many digits")


def _check(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TextTooLong(f"writes more than {MAX_CHARACTERS:,} characters")
