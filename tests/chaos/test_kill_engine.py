"""Losses in mid-scoring: a node of three, and the driver. The store ends as an undisturbed one's, at the cost of a granule.

What a lost engine's process costs is in tests/integration/test_reference_pool.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chaos import test_kill_driver as driver
from tests.helpers.lose_a_node import GRANULES, GROUPS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


def scored_on_three_nodes(directory: Path, what: str) -> dict[str, Any]:
    directory.mkdir()
    program = Path(__file__).resolve().parents[1] / "helpers" / "lose_a_node.py"
    done = subprocess.run(
        [sys.executable, str(program), str(directory), what], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if line.startswith('{"groups"'))  # Ray writes there as well
    return json.loads(said)


@pytest.mark.long
def test_a_lost_node_costs_at_most_a_granule(tmp_path: Path) -> None:
    quiet = scored_on_three_nodes(tmp_path / "quiet", "keep")
    struck = scored_on_three_nodes(tmp_path / "struck", "lose")
    sequences = 2 * GROUPS * GRANULES
    assert quiet["scored"] == quiet["keys"] == quiet["sequences"] == sequences
    assert struck["lost"]
    assert any("was lost: " in event for event in struck["events"])
    assert struck["keys"] == struck["sequences"] == sequences
    assert struck["groups"] == GROUPS * GRANULES
    assert struck["scored"] - sequences <= 2 * GROUPS
    for ours, theirs in zip(struck["values"], quiet["values"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def sequences_of_the_last_run(root: Path) -> int:
    (manifest,) = (root / "out" / "artifacts").glob("reference-*/manifest.json")
    return json.loads(manifest.read_text())["figures"]["sequences"]


@pytest.mark.long
def test_a_driver_that_is_killed_twice_while_it_scores(tmp_path: Path) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    killed.mkdir()
    driver.finish(quiet)
    expected, rows = driver.stored(quiet)
    assert rows == len(expected) == sequences_of_the_last_run(quiet)
    committed = 0
    for segments in (2, 5):  # two losses
        driver.kill_when(
            killed, lambda n=segments: len(list((killed / "out" / "reference-store").glob("*/segment-*.parquet"))) >= n
        )
        committed = len(driver.stored(killed)[0])
    driver.finish(killed)
    found, rows = driver.stored(killed)
    assert found.keys() == expected.keys()
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], atol=1e-5)
    per_granule = 2 * driver.RECIPE["reference"]["groups_per_granule"]
    assert rows - len(found) <= 2 * per_granule  # an engine may outlive its driver by the granule that it is at
    assert 0 < sequences_of_the_last_run(killed) <= len(found) - committed
