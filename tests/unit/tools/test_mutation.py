"""The list of small faults that no test sees: what is read of a mutant, what explains it, and that the tables are true."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tools.mutation import EXPLAINED, ROOT, TESTS, Change, Result, change_of, explains, files_of, report, stated_tests

SHOWN = """# dpo_ray.evaluate.metrics.x_reward_figures__mutmut_40: survived
--- dpo_ray/evaluate/metrics.py
+++ dpo_ray/evaluate/metrics.py
@@ -10,5 +10,5 @@
         "true_reward_gain": float(gain.mean()),
-    return np.array(
-        values
-    )
+    return None
     }
"""
CHANGE = Change("reward_figures", "return np.array( values )", "return None")


def test_a_change_is_read_from_what_is_shown() -> None:
    assert change_of("dpo_ray.evaluate.metrics.x_reward_figures__mutmut_40", SHOWN) == CHANGE
    assert change_of("dpo_ray.artifacts.lease.xǁLeaseǁ_take__mutmut_3", SHOWN).function == "Lease._take"
    assert change_of("dpo_ray.evaluate.metrics.x__mean__mutmut_1", SHOWN).function == "_mean"


def test_an_explanation_is_of_one_change_or_of_all_changes_of_its_lines() -> None:
    entry = {"module": "m.py", "function": "reward_figures", "before": "return np.array( values )", "why": "w"}
    assert explains(entry, CHANGE)
    assert explains({**entry, "after": "return None"}, CHANGE)
    assert not explains({**entry, "after": "return 1"}, CHANGE)
    assert not explains({**entry, "function": "_mean"}, CHANGE)
    assert not explains({**entry, "before": "return np.array( value )"}, CHANGE)


def test_what_is_not_explained_is_listed_with_its_change(capsys: pytest.CaptureFixture[str]) -> None:
    other = Change("_mean", "a + b", "a - b")
    counts = Counter({"killed": 7, "timeout": 1, "survived": 1, "no tests": 1})
    result = Result("dpo_ray/m.py", counts, [("survived", CHANGE), ("no tests", other)])
    entry = {"function": "_mean", "before": "a + b"}
    gone = {"function": "_mean", "before": "c + d"}
    assert report(result, [entry, gone]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "dpo_ray/m.py: 10 mutants, 8 seen, 1 explained, 1 not seen",
        "  reward_figures: survived",
        "    - return np.array( values )",
        "    + return None",
        "  explained, but does not survive: remove it from mutation_survivors.toml: c + d",
    ]


def test_modules_and_their_tests_exist() -> None:
    for key in TESTS:
        for module in files_of(key):
            assert all((ROOT / test).exists() for test in stated_tests(module)), module
    with pytest.raises(SystemExit, match=r"no tests are stated for dpo_ray/errors\.py"):
        stated_tests("dpo_ray/errors.py")


def test_every_explanation_has_its_lines_in_its_module() -> None:
    for entry in tomllib.loads(EXPLAINED.read_text())["survivor"]:
        lines = Path(ROOT, entry["module"]).read_text().splitlines()
        assert entry["before"] in " ".join(line.strip() for line in lines), entry
        assert entry["why"]
        assert not entry.keys() - {"module", "function", "before", "after", "why"}
