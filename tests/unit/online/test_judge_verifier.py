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
from dpo_ray.online.judges.unit_test.run import can_confine, passes


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
        (None,), reason="the reference answer contains no number"
    )


def test_patterns(tmp_path: Path) -> None:
    assert verdict(tmp_path, r"\bcat(s)?\b", "two cats", "concatenate", check="regex").scores == (1.0, 0.0)
    said = verdict(tmp_path, "(", "x", check="regex")
    assert said.scores == (None,)
    assert "not a regular expression" in said.reason


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
    assert not passes(code, TESTS, timeout_seconds=10, memory_mib=256, confined=can_confine())


def test_code_that_passes() -> None:
    assert passes(GOOD, TESTS, timeout_seconds=10, memory_mib=256, confined=can_confine())
    assert passes(
        GOOD + "print('x' * 1_000_000)", TESTS, timeout_seconds=10, memory_mib=256, confined=can_confine()
    )  # nobody reads that
    reads = (
        "import sys, os\nassert sys.stdin.read() == ''\nassert os.listdir() and not os.environ.get('SECRET')\n" + GOOD
    )
    os.environ["SECRET"] = "token"
    assert passes(reads, TESTS, timeout_seconds=10, memory_mib=256, confined=can_confine())
    del os.environ["SECRET"]


def test_endless_code_is_killed_with_all_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(mark)!r}, 'w').close()\n    time.sleep(0.02)\n"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    begun = time.monotonic()
    assert not passes(code + "while True: pass", TESTS, timeout_seconds=2, memory_mib=512, confined=can_confine())
    assert time.monotonic() - begun < 6
    waiting = f"import os, time\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)\n"
    assert mark.exists()
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()
    assert passes(
        code + waiting + GOOD, TESTS, timeout_seconds=10, memory_mib=512, confined=can_confine()
    )  # one that ends well leaves nobody either
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()


CHEATS = {
    "tests are overwritten": "import glob\nfor p in glob.glob('../*/tests.py') + ['tests.py']:\n    open(p, 'w').write('')\n",
    "what the process was told": "import sys, os\nfor d in range(3, 20):\n    try: os.write(d, b'x' * 32)\n    except OSError: pass\n",
    "an object that equals everything": "class All:\n    def __eq__(self, other): return True\ndef add(a, b): return All()\n",
    "an int that equals everything": "class All(int):\n    def __eq__(self, other): return True\ndef add(a, b): return All(99)\n",
    "a list that equals everything": "class All(list):\n    def __eq__(self, o): return True\ndef add(a, b): return All()\n",
    "assertions are caught": "import builtins\nbuiltins.AssertionError = ValueError\ndef add(a, b): return 0\n",
    "it ends well and early": "import os, atexit\ndef add(a, b): os._exit(0)\n",
    "it answers for the channel": (
        "import os, json\nfor d in range(3, 20):\n    try: os.write(d, b'{\"names\": {}}\\n' * 9)\n    except OSError: pass\nos._exit(0)\n"
    ),
    "a name of Python's": "len = lambda *a: 0\nadd = print\n",
}


@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS.keys())
def test_code_that_does_not_solve_does_not_pass(code: str) -> None:
    assert not passes(code, TESTS, timeout_seconds=10, memory_mib=512, confined=can_confine())


SOLVES = {
    "a function": (GOOD, TESTS),
    "lists, tuples, sets, dictionaries": (
        "def f(x): return {'a': [x, (x, 2.5)], 3: {x}, None: b'z', 'big': 10**50, 'c': 1j, 'n': float('inf')}",
        "r = f(1)\nassert r == {'a': [1, (1, 2.5)], 3: {1}, None: b'z', 'big': 10**50, 'c': 1j, 'n': float('inf')}\n"
        "assert isinstance(r['a'][1], tuple) and type(r[3]) is set",
    ),
    "subclasses of plain types": (
        "from collections import Counter, namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return Counter('aab'), P(1, 2)",
        "c, p = f()\nassert c == {'a': 2, 'b': 1} and p == (1, 2)",
    ),
    "a list that is changed in place": (
        "def f(x): x.sort(); x.append(9)",
        "x = [3, 1]\nassert f(x) is None\nassert x == [1, 3, 9]",
    ),
    "an exception": (
        "class Odd(ValueError): pass\ndef f(x):\n    if x: raise Odd('odd')",
        "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'odd'\nelse:\n    raise AssertionError\nassert f(0) is None",
    ),
    "a class": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]\n"
        "    def __iter__(self): return iter(self.items)\n    def __contains__(self, x): return x in self.items",
        "s = Stack()\ns.push(4)\ns.push(5)\nassert len(s) == 2 and s[0] == 4 and list(s) == [4, 5] and 5 in s and 6 not in s\n"
        "assert s.items == [4, 5]\ns.items = [1]\nassert list(s) == [1]",
    ),
    "a generator": (
        "def f(n):\n    for i in range(n): yield i * i",
        "assert list(f(4)) == [0, 1, 4, 9]\nassert next(f(1)) == 0",
    ),
    "a function as an argument": (
        "def f(g, xs): return [g(x, k=1) for x in xs]",
        "assert f(lambda x, k: x + k, [1, 2]) == [2, 3]",
    ),
    "a module that it imports": (
        "import math\nimport math as m\ndef f(x): return math.floor(x)",
        "assert f(2.5) == m.floor(2.5) == 2",
    ),
    "a check with a candidate": (GOOD, "def check(candidate):\n    assert candidate(2, 2) == 4\ncheck(add)"),
    "a function that gives one": ("def adder(n): return lambda x: x + n", "assert adder(2)(3) == 5"),
    "text of any kind": ("def f(s): return s[::-1]", "assert f('a\\ud800é') == 'é\\ud800a'"),
}


@pytest.mark.parametrize(("code", "tests"), SOLVES.values(), ids=SOLVES.keys())
def test_code_that_solves_passes_and_its_tests_can_fail(code: str, tests: str) -> None:
    assert passes(code, tests, timeout_seconds=10, memory_mib=512, confined=can_confine())
    assert not passes(code, f"{tests}\nassert False", timeout_seconds=10, memory_mib=512, confined=can_confine())


@pytest.mark.skipif(not can_confine(), reason="this machine does not allow user namespaces")
def test_code_reaches_neither_network_nor_other_processes(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    code = f"""
import os, socket, subprocess, sys, time
def network():
    try:
        socket.create_connection(("127.0.0.1", {os.getpid() % 1000 + 20000}), timeout=1)
    except OSError as error:
        return error.errno
def environment():
    try:
        return open("/proc/{os.getpid()}/environ").read()
    except OSError:
        return "refused"
def kills():
    try:
        os.kill({os.getpid()}, 0)
    except OSError:
        return "refused"
def escapes():
    child = "import os, time\\nos.setsid()\\nif os.fork() == 0:\\n  while True:\\n"
    child += "    open({str(mark)!r}, 'w').close()\\n    time.sleep(0.02)"
    subprocess.Popen([sys.executable, "-c", child])
    while not os.path.exists({str(mark)!r}):
        time.sleep(0.01)
    return os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else []
"""
    tests = (
        "assert network() in (99, 101, 111)\nassert environment() == 'refused'\nassert kills() == 'refused'\nescapes()"
    )
    assert passes(code, tests, timeout_seconds=20, memory_mib=512)
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists()


def test_where_code_cannot_be_confined_the_judge_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_ray.online.judges.verifier.can_confine", lambda: False)
    with pytest.raises(ConfigError, match="allow_unconfined=true"):
        verdict(tmp_path, TESTS, GOOD, check="unit_test")
    assert verdict(tmp_path, TESTS, GOOD, check="unit_test", allow_unconfined=True).scores == (1.0,)


def test_unit_tests_run_once_and_are_remembered(tmp_path: Path) -> None:
    counted = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n" + GOOD
    for _ in range(2):
        said = verdict(
            tmp_path / "memory", TESTS, counted, "pass", check="unit_test", allow_unconfined=not can_confine()
        )
        assert said.scores == (1.0, 0.0)
    assert (tmp_path / "runs").read_text() == "x"
    fenced = verdict(
        tmp_path,
        TESTS,
        f"Here:\n```python\n{GOOD}```",
        check="unit_test",
        allow_unconfined=not can_confine(),
        extract=r"(?s)```python\n(.*?)```",
    )
    assert fenced.scores == (1.0,)
