"""Bounds: templates that never end or make too much text are stopped, and nothing else is."""

from __future__ import annotations

import datetime
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jinja2
import pytest

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.data.tokenizing.sandbox import MAX_CHARACTERS, TextTooLong, compile_template
from dpo_ray.data.tokenizing.tokenize import tokenize_groups
from dpo_ray.data.tokenizing.watchdog import Watchdog
from tests.unit.data.conftest import CHATML

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def rendered(template: str, **variables: object) -> str:
    return compile_template(template, datetime.date(2024, 7, 26))(variables)


BOMBS = {
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat from the left": "{{ 10**9 * 'a' }}",
    "repeat a list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "square of squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent of a width": "{{ '%*d' % (10**9, 1) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "format method": "{{ '{:9999999999}'.format(1) }}",
    "format of a width": "{{ '{:{}}'.format(1, 10**9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t\\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "JSON": "{{ [1] | tojson(indent=10**9) }}",
    "replace": "{{ (a * 10000) | replace('a', a * 10000) }}",
    "replace method": "{{ (a * 10000).replace('a', a * 10000) }}",
    "join": "{{ range(10000) | join(a * 10000) }}",
    "join method": "{{ (a * 10000).join(['b'] * 10000) }}",
    "doubling": "{% set n = namespace(x=a) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x=a) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling a list": "{% set n = namespace(x=[a]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling what is written out": "{% set n = namespace(x=a) %}{% macro f(x) %}{{ x + x }}{% endmacro %}"
    "{% for i in range(99) %}{% set n.x = f(n.x) %}{% endfor %}",
    "doubling what is captured": "{% set n = namespace(x=a) %}"
    "{% for i in range(99) %}{% set n.x %}{{ n.x + n.x }}{% endset %}{% endfor %}",
    "doubling inside a sum": "{% set n = namespace(x=[a]) %}"
    "{% for i in range(99) %}{{ (n.x + n.x) | length + 1 }}{% set n.x = n.x + n.x %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ a * 10000 }}{% endfor %}",
    "captured": "{% set x %}{% for i in range(99999) %}{{ a * 10000 }}{% endfor %}{% endset %}",
    "macro": "{% macro f() %}{% for i in range(99999) %}{{ a * 10000 }}{% endfor %}{% endmacro %}{{ f() | length }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_text_beyond_the_limit_is_not_made(name: str):
    began = time.process_time()
    with pytest.raises(TextTooLong):
        rendered(BOMBS[name], a="a")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '-' * 3 }}{{ 2 * 3 }}{{ 2 ** 10 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 7 % 4 }}", "---61024ab[1, 2]3"),
        ("{{ '%5d|%s' % (1, 'x') }}{{ '%s' % 'y' }}{{ '%s-%s' | format('a', 'b') }}", "    1|xya-b"),
        ("{{ '{:>4}|{a}'.format(1, a=2) }}{{ '{x}'.format_map({'x': 3}) }}", "   1|23"),
        ("{{ 'x' | center(5) }}{{ 'x'.zfill(3) }}{{ 'a\nb' | indent(2) }}", "  x  00xa\n  b"),
        ("{{ 'abab' | replace('a', 'cc') }}{{ 'abab'.replace('a', 'cc', 1) }}", "ccbccbccbab"),
        (
            "{{ [1, 'b'] | join(', ') }}{{ ', '.join(['a', 'b']) }}{{ messages | join('', attribute='c') }}",
            "1, ba, bde",
        ),
        ("{{ 'a' ~ 1 ~ none }}{{ {'é': '<b>'} | tojson }}{{ [1] | tojson(indent=1) }}", 'a1None{"é": "<b>"}[\n 1\n]'),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.c }}{% endfor %}", "e"),
        ("{% for m in messages %}{{ m.c }}{% break %}{% endfor %}", "d"),
    ],
)
def test_what_templates_do_is_as_without_bounds(template: str, expected: str):
    assert rendered(template, messages=[{"c": "d"}, {"c": "e"}]) == expected


def test_text_up_to_the_limit_is_made():
    assert len(rendered("{% for i in range(4) %}{{ a }}{% endfor %}", a="a" * (MAX_CHARACTERS // 4))) == MAX_CHARACTERS
    with pytest.raises(TextTooLong):
        rendered("{% for i in range(4) %}{{ a }}{% endfor %}!", a="a" * (MAX_CHARACTERS // 4))


def test_invalid_syntax_is_told():
    with pytest.raises(jinja2.TemplateSyntaxError):
        rendered("{% for %}")


def test_a_loop_without_output_is_stopped_in_any_thread_and_its_neighbours_are_not(chatml_dir: str):
    tokenizer = load_tokenizer(chatml_dir)
    template = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + CHATML
    config = DataConfig(train=("rows.jsonl",))  # type: ignore[arg-type]
    groups = [TextGroup(text, ("yes", "no"), (1.0, 0.0)) for text in ("a", "loop", "b", "loop", "c")]

    def run(_: int):
        assert threading.current_thread() is not threading.main_thread()
        return tokenize_groups(groups, tokenizer, template, config)

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(run, range(2)):
            assert [r.reason if isinstance(r, Rejected) else "" for r in results] == (
                ["", "TEMPLATE_LIMIT", "", "TEMPLATE_LIMIT", ""]
            )
            assert isinstance(results[4], TokenGroup)
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


def busy(seconds: float) -> int:
    until, turns = time.thread_time() + seconds, 0
    while time.thread_time() < until:
        turns += 1
    return turns


def test_calls_around_the_limit_end_or_are_stopped_and_nothing_is_raised_afterwards():
    stopped = 0
    with Watchdog(0.1) as watchdog:
        for i in range(40):  # the watchdog looks every 0.05 s: many end at the moment at which they would be stopped
            try:
                watchdog.run(lambda i=i: busy(0.09 + 0.003 * i))
            except TimeoutError:
                stopped += 1
            busy(0.001)  # a late exception would arrive here
    assert 0 < stopped < 40
    busy(0.01)


def test_a_call_passes_on_its_result_and_its_error():
    with Watchdog(1.0) as watchdog:
        assert watchdog.run(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            watchdog.run(lambda: 1 // 0)


def test_waiting_takes_no_cpu_and_is_no_overrun():
    with Watchdog(0.05) as watchdog:
        assert watchdog.run(lambda: time.sleep(0.3)) is None
