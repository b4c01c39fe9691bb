"""The user's filters: found by name, run on a row, and taken to a process that lacks their file."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

from dpo_ray.data.admission import Rejected
from dpo_ray.data.filters import Filter, load_filters, rejected_by
from dpo_ray.data.groups import TextGroup
from dpo_ray.errors import ConfigError

FILTERS = """
from __future__ import annotations
import re
from dataclasses import dataclass

@dataclass
class Limit:
    characters: int | None = None

URL = re.compile(r"https?://")
LIMIT = Limit(20)
calls = []

def no_urls(prompt, completions):
    return not any(URL.search(text) for text in completions)

def short(prompt, completions):
    calls.append(prompt)
    longest = max(map(len, completions))
    return longest <= LIMIT.characters or f"{longest} characters"

def nothing(prompt, completions):
    URL.search(completions[0])

def fails(prompt, completions):
    return 1 / len(completions[0].strip("x"))

def spoils(prompt, completions):
    completions.clear()
    prompt[0]["content"] = "?"
    return True

number = 3
"""

GROUP = TextGroup("a prompt", ("xxx", "no"), (1.0, 0.0))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write a module into the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(source: str = FILTERS, name: str = "my_filters.py") -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)

    return write


def why(group: TextGroup, *names: str) -> tuple[str, str] | None:
    rejected = rejected_by(group, load_filters([f"my_filters:{name}" for name in names]))
    assert rejected is None or isinstance(rejected, Rejected)
    return (rejected.reason, rejected.detail) if rejected else None


def test_true_keeps_and_false_or_text_leaves_out(write):
    write()
    with_url = TextGroup("a prompt", ("see https://a.b", "no"), (1.0, 0.0))
    long = TextGroup("a prompt", ("no", "long " * 5), (1.0, 0.0))
    assert why(GROUP) is None
    assert why(GROUP, "no_urls", "short") is None
    assert why(with_url, "short", "no_urls") == ("FILTERED", "my_filters:no_urls")
    assert why(long, "no_urls", "short") == ("FILTERED", "25 characters")


def test_filters_after_one_that_leaves_the_row_out_are_not_asked(write):
    write()
    filters = load_filters(["my_filters:no_urls", "my_filters:short"])
    calls = filters[1].function.__globals__["calls"]
    rejected_by(TextGroup("one", ("http://a", "no"), (1.0, 0.0)), filters)
    rejected_by(TextGroup("two", ("text", "no"), (1.0, 0.0)), filters)
    assert calls == ["two"]


def test_messages_come_as_a_list_and_completions_as_text_that_a_filter_may_change(write):
    write()
    messages = ({"role": "user", "content": "hello"},)
    answer = {"role": "assistant", "content": "see http://a", "tool_calls": []}
    group = TextGroup(messages, (answer, {"role": "assistant", "content": None, "tool_calls": []}), (1.0, 0.0))
    assert why(group, "spoils") is None
    assert messages[0]["content"] == "hello"
    assert why(group, "spoils", "no_urls") == ("FILTERED", "my_filters:no_urls")


@pytest.mark.parametrize(
    ("name", "what"),
    [("fails", "`my_filters:fails` raised ZeroDivisionError: division by zero"), ("nothing", "returned NoneType")],
)
def test_a_filter_that_fails_or_says_nothing_is_no_fault_of_the_row(write, name, what):
    write()
    with pytest.raises(ConfigError) as caught:
        why(GROUP, name)
    assert caught.value.where == "data.rules.filters"
    assert what in caught.value.what
    assert "a prompt" in caught.value.what  # the row


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("my_filters:number", "'number' is int, not a function"),
        ("my_filters:absent", "has no attribute 'absent'"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("no_such.module:f", "No module named 'no_such'"),
        ("broken:f", "SyntaxError"),
        ("needs:f", "No module named 'not_installed'"),
    ],
)
def test_what_cannot_be_found_is_an_error_of_the_recipe(write, name, what):
    write()
    write("def f(:", "broken.py")
    write("import not_installed", "needs.py")
    with pytest.raises(ConfigError) as caught:
        load_filters([name])
    assert caught.value.where == "data.rules.filters"
    assert f"`{name}` cannot be imported" in caught.value.what
    assert what in caught.value.what


def test_the_digest_follows_the_source_and_the_name(write):
    write()
    first, other = load_filters(["my_filters:no_urls", "my_filters:short"])
    assert first.digest != other.digest
    assert load_filters(["my_filters:no_urls"])[0].digest == first.digest
    write(FILTERS.replace("https?", "http"))
    changed = load_filters(["my_filters:no_urls"])[0]
    assert changed.digest != first.digest
    assert changed.function("", ["https://a"])  # what runs is the new source, too


def test_modules_that_are_installed_are_imported_by_name():
    loaded = load_filters(["textwrap:dedent"])[0]
    assert loaded.module is None
    assert loaded.function is textwrap.dedent


def run_elsewhere(filters: tuple[Filter, ...], directory: Path) -> str:
    """Unpickle the filters in a new process and directory; return what the first says of a row with a URL."""
    pickled = directory / "filters.pickle"
    pickled.write_bytes(cloudpickle.dumps(filters))
    program = (
        "import pickle, sys; from dpo_ray.data.filters import rejected_by; from dpo_ray.data.groups import TextGroup;"
        "filters = pickle.load(open(sys.argv[1], 'rb'));"
        "row = TextGroup('a prompt', ('see https://a', 'no'), (1.0, 0.0));"
        "print(rejected_by(row, filters).detail, filters[0].digest, len({id(f.function.__globals__) for f in filters}))"
    )
    done = subprocess.run([sys.executable, "-c", program, pickled], cwd=directory, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_workers_need_no_file_and_execute_a_module_once(write, tmp_path, tmp_path_factory):
    write()
    filters = load_filters(["my_filters:no_urls", "my_filters:short"])
    (tmp_path / "my_filters.py").unlink()
    said = run_elsewhere(filters, tmp_path_factory.mktemp("worker"))
    assert said == f"my_filters:no_urls {filters[0].digest} 1"


def test_modules_beside_the_filter_are_found_where_the_directory_is_shared(write, tmp_path, tmp_path_factory):
    write("PATTERN = 'https'", "my_words.py")
    write("import my_words\ndef f(prompt, completions): return my_words.PATTERN not in completions[0]", "beside.py")
    write("", "my_package/__init__.py")
    write(FILTERS.replace("import re", "import re; from .words import PATTERN", 1), "my_package/rules.py")
    write("PATTERN = 'https'", "my_package/words.py")
    names = ["beside:f", "my_package.rules:no_urls"]
    worker = tmp_path_factory.mktemp("worker")
    for name in names:
        filters = load_filters([name])
        assert run_elsewhere(filters, worker) == f"{name} {filters[0].digest} 1"
    (tmp_path / "my_words.py").unlink()
    assert "ModuleNotFoundError: No module named 'my_words'" in run_elsewhere(load_filters(names[:1]), worker)
