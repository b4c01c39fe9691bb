"""Verifiers: what holds against a reference answer, and what cannot stop or hang them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.judge import VerifierJudge
from dpo_ray.errors import ConfigError
from dpo_ray.online.judges.make import judge_digest, make_judge
from dpo_ray.online.judges.memory import JournalMemory
from dpo_ray.online.judges.protocol import Question, Verdict
from dpo_ray.online.judges.unit_test import passes


def verdict(tmp_path: Path, answer: str | None, *completions: str, **settings: object) -> Verdict:
    config = VerifierJudge.model_validate(settings)
    judge = make_judge(config, JournalMemory(Storage(tmp_path), judge_digest(config), "one"))
    ((number, said),) = judge.judge([Question("p", completions, answer)])
    judge.close()
    assert number == 0
    return said


@pytest.mark.parametrize("check", ["exact", "numeric", "regex", "unit_test"])
def test_without_a_reference_answer_it_abstains(tmp_path: Path, check: str) -> None:
    assert verdict(tmp_path, None, "a", "b", check=check) == Verdict((None, None), reason="no reference answer")


def test_exact_but_for_white_space_and_case(tmp_path: Path) -> None:
    said = verdict(tmp_path, "New  York", " new york\n", "NEW\tYORK", "New York!", "newyork", check="exact")
    assert said.scores == (1.0, 1.0, 0.0, 0.0)


def test_the_extracted_part_counts_and_of_several_the_last(tmp_path: Path) -> None:
    completions = ("<a>x</a> no, <a>y</a>", "<a>y</a> no, <a>x</a>", "y", "<a></a>")
    assert verdict(tmp_path, "y", *completions, check="exact", extract="<a>(.*?)</a>").scores == (1.0, 0.0, 0.0, 0.0)
    assert verdict(tmp_path, "Y", "(b) B (a) y", check="exact", extract=r"\(a\) (.)|\(c\)").scores == (1.0,)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 42.", 42),
        ("#### 1,234", 1234),
        ("$1,234,567.50", 1234567.5),
        ("1,2,3", 3),
        ("-7", -7),
        ("it is \N{MINUS SIGN}7 degrees", -7),
        ("x=-3", -3),
        ("5-3", 3),
        ("10 - 3", 3),
        ("2e-4", 2e-4),
        (".5", 0.5),
        ("3.14", 3.14),
        ("version 3.14.15", 3.14),
        ("+8", 8),
        ("**72**", 72),
        (r"\boxed{72}", 72),
        ("72km", 72),
        ("No.5", 5),
        ("12,3456", 3456),
        ("0.1 + 0.2 = 0.3", 0.3),
        ("007", 7),
    ],
)
def test_the_last_number(tmp_path: Path, text: str, number: float) -> None:
    assert verdict(tmp_path, repr(number), text, check="numeric", tolerance=0).scores == (1.0,)
    assert verdict(tmp_path, repr(number + 1), text, check="numeric").scores == (0.0,)


def test_numbers_within_the_tolerance(tmp_path: Path) -> None:
    said = verdict(tmp_path, "the answer is 10", "10.5", "10.51", "none", "1e999", "", check="numeric", tolerance=0.5)
    assert said.scores == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert verdict(tmp_path, "a dozen", "12", check="numeric") == Verdict(
        (None,), reason="the reference answer holds no number"
    )


def test_patterns(tmp_path: Path) -> None:
    assert verdict(tmp_path, r"\bcat(s)?\b", "two cats", "concatenate", check="regex").scores == (1.0, 0.0)
    said = verdict(tmp_path, "(", "x", check="regex")
    assert said.scores == (None,)
    assert "no pattern" in said.reason


def test_a_pattern_that_runs_away_abstains_in_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    said = verdict(tmp_path, r"^(a|aa)+$", "a" * 60 + "!", "aaa", check="regex", timeout_seconds=0.3)
    assert said.scores == (None, 1.0)
    assert "took over 0.3 s" in said.reason
    settings = {"check": "exact", "extract": r"^((?:a|aa)+)$", "timeout_seconds": 0.3}
    assert verdict(tmp_path, "x", "a" * 60 + "!", **settings).scores == (None,)
    assert time.monotonic() - begun < 5


def test_a_wrong_extract_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        verdict(tmp_path, "x", "x", check="exact", extract="(")
    with pytest.raises(ConfigError, match="has 2 groups"):
        verdict(tmp_path, "x", "x", check="exact", extract="(a)(b)")


GOOD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
FAILING = {
    "wrong": GOOD.replace("+", "-"),
    "no Python": "def add(a, b) return",
    "exits well": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "raises": "raise RuntimeError",
    "too much memory": GOOD + "x = bytearray(2 << 30)",
    "too large a file": GOOD + "open('f', 'wb').write(bytes(300 << 20))\n" * 3,
    "recursion": "def add(a, b):\n    return add(a, b)\n",
    "NUL": "\0",
}


@pytest.mark.parametrize("code", FAILING.values(), ids=FAILING.keys())
def test_code_that_passes_no_tests(code: str) -> None:
    assert not passes(code, TESTS, timeout_seconds=10, memory_mib=256)


def test_code_that_passes() -> None:
    assert passes(GOOD, TESTS, timeout_seconds=10, memory_mib=256)
    assert passes(GOOD + "print('x' * 1_000_000)", TESTS, timeout_seconds=10, memory_mib=256)  # nobody reads that
    reads = (
        "import sys, os\nassert sys.stdin.read() == ''\nassert os.listdir() and not os.environ.get('SECRET')\n" + GOOD
    )
    os.environ["SECRET"] = "token"
    assert passes(reads, TESTS, timeout_seconds=10, memory_mib=256)
    del os.environ["SECRET"]


def test_endless_code_is_killed_with_all_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(mark)!r}, 'w').close()\n    time.sleep(0.02)\n"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    begun = time.monotonic()
    assert not passes(code + "while True: pass", TESTS, timeout_seconds=2, memory_mib=512)
    assert time.monotonic() - begun < 6
    waiting = f"import os, time\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)\n"
    assert mark.exists()
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()
    assert passes(
        code + waiting + GOOD, TESTS, timeout_seconds=10, memory_mib=512
    )  # one that ends well leaves nobody either
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()


def test_unit_tests_run_once_and_are_remembered(tmp_path: Path) -> None:
    counted = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n" + GOOD
    for _ in range(2):
        said = verdict(tmp_path / "memory", TESTS, counted, "pass", check="unit_test")
        assert said.scores == (1.0, 0.0)
    assert (tmp_path / "runs").read_text() == "x"
    fenced = verdict(
        tmp_path, TESTS, f"Here:\n```python\n{GOOD}```", check="unit_test", extract=r"(?s)```python\n(.*?)```"
    )
    assert fenced.scores == (1.0,)
