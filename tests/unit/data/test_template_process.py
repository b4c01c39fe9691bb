"""The process of templates: it renders what Jinja renders, nothing outlives its limits, and it ends with who started it."""

from __future__ import annotations

import datetime
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.tokenizing.chat import MAX_OVERRUNS, load_tokenizer, resolve_template
from dpo_ray.data.tokenizing.sandbox import MAX_CHARACTERS
from dpo_ray.data.tokenizing.template_process import Answer, Asked, TemplateProcess
from dpo_ray.data.tokenizing.template_program import DONE, ERROR, INVALID, LIMIT, MEMORY_BYTES, TEXT_SECONDS
from dpo_ray.data.tokenizing.tokenize import stop_tokens, tokenize_groups
from dpo_ray.errors import ConfigError, DataError
from tests.unit.data.conftest import CHATML

DATE = datetime.date(2024, 7, 26)
PROGRAM = "dpo_ray.data.tokenizing.template_program"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CONFIG = DataConfig.model_validate({"train": "rows.jsonl"})


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    with TemplateProcess() as process:
        yield process


def answer(process: TemplateProcess, template: str, **variables: Any) -> Answer:
    """Render one text."""
    (answer,) = process.render((template,), DATE, {}, [Asked(0, variables, [([], False)])])
    return answer


def started() -> set[psutil.Process]:
    """Return the processes of templates that this process, or one that it has started, has."""
    return {child for child in psutil.Process().children(recursive=True) if PROGRAM in child.cmdline()}


# -- limits

TUPLES = (
    "{% set n = namespace(d=(1,), e=(1,)) %}"
    "{% for i in range(60) %}{% set n.d = (n.d, n.d) %}{% set n.e = (n.e, n.e) %}{% endfor %}"
)
LISTS = "{% set n = namespace(d=[1]) %}{% for i in range(60) %}{% set n.d = [n.d, n.d] %}{% endfor %}"
DICTS = "{% set n = namespace(d={'a': 1}) %}{% for i in range(60) %}{% set n.d = {'a': n.d, 'b': n.d} %}{% endfor %}"
ATTACKS = {
    "equal tuples": TUPLES + "{{ n.d == n.e }}",
    "tuple in": TUPLES + "{{ n.d in [n.e, n.e] }}",
    "hash": TUPLES + "{{ {n.d: 1} }}",
    "unique": TUPLES + "{{ [n.d, n.e] | unique | list }}",
    "sort": TUPLES + "{{ [n.d, n.e] | sort }}",
    "groupby": TUPLES + "{{ [{'a': n.d}, {'a': n.e}] | groupby('a') }}",
    "text of tuples": TUPLES + "{{ n.d }}",
    "text of lists": LISTS + "{{ n.d | string }}",
    "pprint": LISTS + "{{ n.d | pprint }}",
    "text of dicts": DICTS + "{{ n.d }}",
    "JSON": DICTS + "{{ n.d | tojson }}",
    "text in an error": LISTS + "{{ raise_exception(n.d) }}",
    "shared text": "{% set b = [a] * 100000 %}{% set c = [b] * 100000 %}{{ c }}",
    "sum": "{{ ([[a] * 10**6] * 10**5) | sum(start=[]) }}",
    "slice": "{{ [a] | slice(10**9) | list }}",
    "batch": "{{ [a] | batch(10**9, 0) | list }}",
    "repeat": "{{ a * 10**9 }}",
    "repeat a list": "{{ ([a] * 10**9) | length }}",
    "power": "{{ (a | length + 9) ** (10**9) % 7 }}",
    "square of squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "percent of a width": "{{ '%*s' % (10**9, a) }}",
    "format": "{{ '{:>9999999999}'.format(a) }}",
    "center": "{{ a | center(10**9) }}",
    "expand tabs": "{{ (a ~ '\\t\\t').expandtabs(10**9) }}",
    "indent": "{{ ((a ~ '\n') * 10**5) | indent(10**6, true) }}",
    "replace": "{{ (a * 10000) | replace('a', a * 10**7) }}",
    "translate": "{{ (a * 10**7).translate({97: a * 10**5}) }}",
    "join": "{{ range(100000) | join(a * 100000) }}",
    "wordwrap": "{{ (a * 10**7) | wordwrap(1, wrapstring=a * 1000) }}",
    "xmlattr": "{{ {'a': a * 10**9} | xmlattr }}",
    "map": "{{ range(100000) | map('string') | map('center', 10**6) | list | length }}",
    "doubling": "{% set n = namespace(x=a) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "macros": "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "loops": LOOP,
    "output": "{% for i in range(99999) %}{{ a * 10**6 }}{% endfor %}",
    "captured": "{% set x %}{% for i in range(99999) %}{{ a * 10**6 }}{% endfor %}{% endset %}",
}
CONSTANTS = {
    "sum": "{{ ([[0] * 10**6] * 10**5) | sum(start=[]) }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "power": "{{ 10 ** (10**10) }}",
    "equal": "{{ [[0] * 10**5] * 10**5 == [[0] * 10**5] * 10**5 }}",
    "text": "{{ ([['a'] * 10**5] * 10**5) | string }}",
    "never reached": "{% if messages %}{{ 9 ** (10**9) }}{% endif %}",
}


def cpu_seconds_of_ended_processes() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_outlives_the_limits(name: str, process: TemplateProcess):
    before = cpu_seconds_of_ended_processes()
    result = answer(process, ATTACKS[name], a="a")
    assert result.end == LIMIT
    assert result.detail
    # a start, and one text; a filter that is compiled with constants alone may be computed twice
    assert cpu_seconds_of_ended_processes() - before < 2 * TEXT_SECONDS + 1


@pytest.mark.parametrize("name", CONSTANTS)
def test_nor_does_what_jinja_computes_when_it_compiles(name: str, tmp_path: Path):
    path = tmp_path / "template.jinja"
    path.write_text(CONSTANTS[name])
    before = cpu_seconds_of_ended_processes()
    with pytest.raises(ConfigError, match=r"the template is not valid: compiling it (took|needed)"):
        resolve_template(str(path), None)
    assert cpu_seconds_of_ended_processes() - before < TEXT_SECONDS + 1


def test_memory_is_limited():
    before = started()
    with TemplateProcess() as process:
        answer(process, "")
        (child,) = started() - before
        assert child.rlimit(psutil.RLIMIT_AS) == (MEMORY_BYTES, MEMORY_BYTES)
        result = answer(process, "{{ (a * 10**9) | length }}", a="aa")
    assert (result.end, result.detail) == (LIMIT, "needed more than 1,024 MiB of memory")


def test_text_up_to_the_limit_is_rendered(process: TemplateProcess):
    template = "{% for i in range(4) %}{{ a }}{% endfor %}"
    result = answer(process, template, a="é" * (MAX_CHARACTERS // 4))
    assert (result.end, [len(text) for text in result.texts]) == (DONE, [MAX_CHARACTERS])
    result = answer(process, template + "!", a="a" * (MAX_CHARACTERS // 4))
    assert (result.end, result.detail) == (LIMIT, "wrote more than 16,777,216 characters")


def test_a_process_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch):
    before = started()
    with TemplateProcess() as process:
        answer(process, "")
        process._channel.settimeout(0.5)
        (child,) = started() - before
        child.suspend()
        result = answer(process, "{{ a }}", a="a")
        assert (result.end, result.detail) == (LIMIT, "gave no answer within 60 s")
        assert not child.is_running()
        assert answer(process, "{{ a }}", a="a").texts == ["a"]


# -- what it renders


def of_transformers(template: str, **variables: Any) -> str:
    return _compile_jinja_template(template).render(messages=[], add_generation_prompt=False, **variables)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=5)
    | st.sampled_from(["\ud83d\ude00", "\ud83d", "é\u2028", "</s>&\"'"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(value=VALUES)
def test_every_value_of_a_row_is_rendered_as_without_a_process(value: Any, process: TemplateProcess):
    for template in ("{{ v }}", "{{ v | tojson }}", "{{ v ~ '|' ~ v is mapping }}"):
        assert answer(process, template, v=value).texts == [of_transformers(template, v=value)]


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2024, 7, 26),
        datetime.datetime(2024, 7, 26, 1, 2, 3, 4, datetime.UTC),
        datetime.timedelta(1, 2),
        Decimal("1.50"),
        b"\xff",
        (1, (2,)),
        {1: "a", None: "b"},
        10**400,
        float("inf"),
        pandas.Timestamp(1, unit="ns"),
    ],
)
def test_values_that_only_recipes_and_parquet_have_as_well(value: Any, process: TemplateProcess):
    assert answer(process, "{{ v }}", v=value).texts == [str(value)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '-' * 3 }}{{ 2 * 3 }}{{ 2 ** 10 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 7 % 4 }}", "---61024ab[1, 2]3"),
        ("{{ '%5d|%s' % (1, 'x') }}{{ '%s' % 'y' }}{{ '%s-%s' | format('a', 'b') }}", "    1|xya-b"),
        ("{{ '{:>4}|{a}'.format(1, a=2) }}{{ '{x}'.format_map({'x': 3}) }}", "   1|23"),
        ("{{ 'x' | center(5) }}{{ 'x'.zfill(3) }}{{ 'a\nb' | indent(2) }}", "  x  00xa\n  b"),
        ("{{ 'abab' | replace('a', 'cc') }}{{ 'abab'.replace('a', 'cc', 1) }}", "ccbccbccbab"),
        ("{{ [1, 'b'] | join(', ') }}{{ ', '.join(['a', 'b']) }}{{ rows | join('', attribute='c') }}", "1, ba, bde"),
        ("{{ 'a' ~ 1 ~ none }}{{ {'é': '<b>'} | tojson }}{{ [1] | tojson(indent=1) }}", 'a1None{"é": "<b>"}[\n 1\n]'),
        ("{% for m in rows %}{% if loop.first %}{% continue %}{% endif %}{{ m.c }}{% endfor %}", "e"),
        ("{% for m in rows %}{{ m.c }}{% break %}{% endfor %}", "d"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    ],
)
def test_what_templates_do(template: str, expected: str, process: TemplateProcess):
    assert answer(process, template, rows=[{"c": "d"}, {"c": "e"}]).texts == [expected]


@pytest.mark.parametrize(
    ("template", "end", "detail"),
    [
        ("{% for %}", INVALID, "Expected an expression, got 'end of statement block' (line 1)"),
        ("{{ a | no_such }}", INVALID, "No filter named 'no_such'. (line 1)"),
        ("{{ " + "(" * 9999 + ")" * 9999 + " }}", ERROR, "RecursionError: maximum recursion depth exceeded"),
        ("{{ raise_exception('no') }}", ERROR, "TemplateError: no"),
        (
            "{{ ''.__class__.__mro__ }}",
            ERROR,
            "SecurityError: access to attribute '__class__' of 'str' object is unsafe.",
        ),
    ],
)
def test_errors_say_what_is_wrong(template: str, end: str, detail: str, process: TemplateProcess):
    result = answer(process, template)
    assert (result.end, result.texts) == (end, [])
    assert result.detail.startswith(detail)


def test_a_value_that_cannot_be_sent_rejects_its_row_alone(process: TemplateProcess):
    asked = [Asked(0, {"v": v}, [([], False)]) for v in ("a", lambda: 1, "b")]
    results: list[Answer] = []
    while len(results) < len(asked):
        results += process.render(("{{ v }}",), DATE, {}, asked[len(results) :])
    assert [(r.texts, r.end) for r in results] == [(["a"], DONE), ([], ERROR), (["b"], DONE)]


# -- its life


def test_it_is_told_no_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "CANARY")
    before = started()
    with TemplateProcess() as process:
        answer(process, "")
        (child,) = started() - before
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert b"CANARY" not in environment
    assert {entry.partition(b"=")[0] for entry in environment.split(b"\0")} <= {
        b"",
        b"PYTHONPATH",
        b"OMP_NUM_THREADS",
        b"LD_LIBRARY_PATH",
    }


@pytest.mark.parametrize("text", ["", LOOP])
def test_it_ends_with_the_process_that_started_it(text: str):
    """Even where that one is killed, and the other renders."""
    program = (
        "import datetime, sys; from dpo_ray.data.tokenizing.template_process import Asked, TemplateProcess\n"
        "process, date = TemplateProcess(), datetime.date(2024, 7, 26)\n"
        "process.fault('', date); print('started', flush=True)\n"
        "process.render((sys.argv[1],), date, {}, [Asked(0, {}, [([], False)])]); sys.stdin.read()"
    )
    before = started()
    starter = subprocess.Popen([sys.executable, "-c", program, text], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"started\n"
    (child,) = started() - before
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    child.wait(timeout=60)  # raises if it goes on; one second of CPU time may take long on a busy machine


def test_it_starts_again_after_it_was_ended(process: TemplateProcess):
    for _ in range(2):
        assert answer(process, "{{ a * 10**10 }}", a="a").end == LIMIT
        assert answer(process, "{{ a }}", a="a").texts == ["a"]
    before = started()
    with TemplateProcess() as other:
        answer(other, "")
        (child,) = started() - before
        child.kill()
        child.wait()
        assert answer(other, "{{ a }}", a="a").texts == ["a"]


def test_nothing_is_left_of_it(chatml_dir: str, tmp_path: Path):
    tokenizer, before = load_tokenizer(chatml_dir), (started(), len(os.listdir("/proc/self/fd")))
    resolve_template("auto", tokenizer)
    stop_tokens(tokenizer, CHATML, CONFIG, tmp_path)
    with TemplateProcess() as process:
        tokenize_groups([TextGroup("a", ("yes", "no"), (1.0, 0.0))], tokenizer, CHATML, CONFIG, process)
    assert (started(), len(os.listdir("/proc/self/fd"))) == before


# -- rows


def test_a_row_that_exceeds_the_limits_does_not_affect_its_neighbours_in_any_thread(chatml_dir: str):
    tokenizer = load_tokenizer(chatml_dir)
    template = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + CHATML
    groups = [TextGroup(text, ("yes", "no"), (1.0, 0.0)) for text in ("a", "loop", "b", "loop", "c")]
    with TemplateProcess() as process, ThreadPoolExecutor(2) as pool:
        for results in pool.map(lambda _: tokenize_groups(groups, tokenizer, template, CONFIG, process), range(2)):
            assert [r.reason if isinstance(r, Rejected) else "" for r in results] == (
                ["", "TEMPLATE_LIMIT", "", "TEMPLATE_LIMIT", ""]
            )
            assert isinstance(results[4], TokenGroup)


def test_a_template_that_always_exceeds_its_limits_ends_with_one_error(chatml_dir: str, process: TemplateProcess):
    groups = [TextGroup(f"{i}", ("yes", "no"), (1.0, 0.0)) for i in range(2000)]
    template, tokenizer = "{{ messages[0].content * 10**10 }}", load_tokenizer(chatml_dir)
    began = time.monotonic()
    with pytest.raises(DataError, match=f"more than {MAX_OVERRUNS} rows.*needed more than 1,024 MiB"):
        tokenize_groups(groups, tokenizer, template, CONFIG, process)
    assert time.monotonic() - began < 200


def test_a_template_for_tools_that_is_not_valid_is_told(chatml_dir: str, process: TemplateProcess):
    tokenizer = load_tokenizer(chatml_dir)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{% for %}"}
    with pytest.raises(ConfigError, match="the template is not valid"):
        resolve_template("auto", tokenizer)
    group = TextGroup("a", ("yes", "no"), (1.0, 0.0), tools=({"type": "function"},))
    with pytest.raises(ConfigError, match="the template is not valid"):
        tokenize_groups([group], tokenizer, CHATML, CONFIG, process)
