"""Put small faults into modules, one at a time, and list those that no test sees. `make mutation` runs this.

    python tools/mutation.py [--jobs N] [MODULE ...]     # without a module: all of TESTS, for hours

mutmut makes the faults (mutants) and runs the tests that reach them, in a copy of the checkout. A mutant that survives is listed with
its change, unless tests/mutation_survivors.toml explains it. The exit code is 1 if one is listed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "tests" / "mutation_survivors.toml"

# The tests that have to see a fault in a module, or in all modules of a folder that have no line of their own: paths below tests/unit,
# separated by spaces. Few and quick ones, as each is run often.
TESTS = {
    "dpo_ray/objectives": "objectives/test_formulas.py objectives/test_pairs.py objectives/test_select.py objectives/test_step_logps.py",
    "dpo_ray/evaluate/metrics.py": "evaluate/test_metrics.py evaluate/test_heldout.py",
    "dpo_ray/evaluate/win_rate.py": "evaluate/test_win_rate.py",
    "dpo_ray/evaluate/diversity.py": "evaluate/test_diversity.py",
    "dpo_ray/schedule/order.py": "schedule/test_order.py schedule/test_deal.py schedule/test_stage.py",
    "dpo_ray/schedule/micro_batch.py": "schedule/test_deal.py",
    "dpo_ray/schedule": "schedule",
    "dpo_ray/online/round_state.py": "online/test_round_state.py",
    "dpo_ray/online/promotion.py": "online/test_promotion.py online/test_round_state.py",
    "dpo_ray/online/pair_rules.py": "online/test_pair_rules.py",
    "dpo_ray/online/judges/memory.py": "online/test_judge_memory.py",
    "dpo_ray/data/rules.py": "data/test_rules.py",
    "dpo_ray/data/near_duplicates.py": "data/test_near_duplicates.py",
    "dpo_ray/reference/audit_limits.py": "reference/test_audit_limits.py",
    "dpo_ray/reference/store": "reference/store",
    "dpo_ray/models/head.py": "models/test_head.py",
    "dpo_ray/models/packed_rows.py": "models/test_packed_rows.py models/test_token_logps.py",
    "dpo_ray/models/attention.py": "models/test_attention.py models/test_token_logps.py",
    "dpo_ray/models/token_logps.py": "models/test_token_logps.py models/test_head.py",
    "dpo_ray/train/step.py": "train/test_step.py train/test_loop.py",
    "dpo_ray/train/checkpoint": "train/checkpoint",
}

# A mutant is stopped after this many seconds and this many times what its tests take otherwise.
SETTINGS = """
[mutmut]
source_paths=dpo_ray
only_mutate={module}
do_not_mutate_patterns=
    \\braise \\w+\\(
    \\blogger\\.
pytest_add_cli_args=
    -p
    no:cacheprovider
pytest_add_cli_args_test_selection=
    {tests}
also_copy=
    {others}
process_isolation=fork
timeout_constant=10
timeout_multiplier=5
"""
SEEN = ("killed", "timeout", "caught by type check")  # what mutmut calls a mutant that does not survive


@dataclass(frozen=True)
class Change:
    """What a mutant changes in a function: the lines before and after, each joined into one."""

    function: str
    before: str
    after: str


@dataclass
class Result:
    """The mutants of one module."""

    module: str
    counts: Counter[str] = field(default_factory=Counter)
    survivors: list[tuple[str, Change]] = field(default_factory=list)  # mutmut's word for it, and the change


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="List small faults that no test sees.")
    parser.add_argument("modules", nargs="*", help="files of dpo_ray (default: all that have tests stated)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    options = parser.parse_args(arguments)
    explained = tomllib.loads(EXPLAINED.read_text())["survivor"]
    listed = 0
    for module in options.modules or dict.fromkeys(name for key in TESTS for name in files_of(key)):
        result = run(module, stated_tests(module), options.jobs)
        listed += report(result, [e for e in explained if e["module"] == module])
    return 1 if listed else 0


def files_of(key: str) -> list[str]:
    """List the modules of an entry of TESTS."""
    path = ROOT / key
    found = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return [str(file.relative_to(ROOT)) for file in found if file.name != "__init__.py"]


def stated_tests(module: str) -> list[str]:
    """Return the test files of a module."""
    tests = TESTS.get(module) or TESTS.get(str(Path(module).parent))
    if tests is None or not (ROOT / module).is_file():
        raise SystemExit(f"mutation: no tests are stated for {module}: add it to TESTS in tools/mutation.py")
    return [f"tests/unit/{test}" for test in tests.split()]


def run(module: str, tests: Sequence[str], jobs: int) -> Result:
    """Run mutmut over one module, in a copy of the checkout."""
    with tempfile.TemporaryDirectory(prefix="dpo-ray-mutation-") as name:
        copy = Path(name)
        others = copy_checkout(copy)
        (copy / "mutants").mkdir()  # mutmut fills it; Python looks at its path once, when it starts
        settings = SETTINGS.format(module=module, tests="\n    ".join(tests), others="\n    ".join(others))
        (copy / "setup.cfg").write_text(settings)
        done = mutmut(copy, "run", "--max-children", str(jobs))
        if done.returncode:
            raise SystemExit(f"mutation: mutmut failed on {module}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        result = Result(module)
        for line in mutmut(copy, "results", "--all", "true").stdout.splitlines():
            mutant, _, word = line.strip().rpartition(": ")
            if mutant:
                result.counts[word] += 1
                if word not in SEEN:
                    result.survivors.append((word, change_of(mutant, mutmut(copy, "show", mutant).stdout)))
    return result


def copy_checkout(target: Path) -> list[str]:
    """Copy the files of the checkout that git does not ignore; returns what mutmut would not copy of itself."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)  # noqa: S603
    names = [name for name in listing.stdout.decode().split("\0") if (ROOT / name).is_file()]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return sorted({Path(name).parts[0] for name in names} - {"dpo_ray", "tests", "pyproject.toml", "setup.cfg"})


def mutmut(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run mutmut; processes that tests start import the mutants, too."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "mutants"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)  # noqa: S603


def change_of(mutant: str, shown: str) -> Change:
    """Read the change from what `mutmut show` prints; a method is named CLASS.METHOD."""
    name = mutant.rpartition(".")[2].partition("__mutmut_")[0]
    function = name.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in name else name.removeprefix("x_")
    lines = shown.splitlines()
    before, after = (
        " ".join(line[1:].strip() for line in lines if re.match(rf"{re.escape(sign)}(?!{re.escape(sign * 2)})", line))
        for sign in "-+"
    )
    return Change(function, before, after)


def report(result: Result, explained: Sequence[dict[str, str]]) -> int:
    """Print what was found in a module; returns how many survivors are not explained."""
    unexplained = [(word, c) for word, c in result.survivors if not any(explains(e, c) for e in explained)]
    total, seen = result.counts.total(), sum(result.counts[word] for word in SEEN)
    known = len(result.survivors) - len(unexplained)
    print(f"{result.module}: {total} mutants, {seen} seen, {known} explained, {len(unexplained)} not seen", flush=True)
    for line in described(unexplained):
        print(f"  {line}")
    for entry in explained:
        if not any(explains(entry, change) for _, change in result.survivors):
            print(f"  explained, but does not survive: remove it from {EXPLAINED.name}: {entry['before']}")
    return len(unexplained)


def explains(entry: dict[str, str], change: Change) -> bool:
    """Return whether an entry is about a change; without `after` it is about every change of the line."""
    same = (entry["function"], entry["before"]) == (change.function, change.before)
    return same and entry.get("after", change.after) == change.after


def described(survivors: Sequence[tuple[str, Change]]) -> Iterator[str]:
    for word, change in survivors:
        yield f"{change.function}: {word}"
        yield f"  - {change.before}"
        yield f"  + {change.after}"


if __name__ == "__main__":
    sys.exit(main())
