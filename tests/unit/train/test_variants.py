"""Sharding over one, two and four ranks (hybrid), recomputation, offload: none of them changes what is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .variants_process import VARIANTS

ROOT = Path(__file__).resolve().parents[3]


def run(world: int, directory: Path) -> dict[str, list[list[float]]]:
    directory.mkdir()
    command = [sys.executable, "-m", "tests.unit.train.variants_process"]
    ranks = [subprocess.Popen([*command, str(r), str(world), str(directory)], cwd=ROOT) for r in range(world)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads((directory / "measured.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    return run(1, tmp_path_factory.mktemp("one") / "w1")


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def test_recomputation_and_offload_change_nothing(alone: dict[str, list[list[float]]]) -> None:
    for name in VARIANTS:
        like = "adapter" if name.startswith("adapter") else "plain"
        assert flat(alone[name]) == pytest.approx(flat(alone[like]), rel=1e-6), name
    assert alone["plain"][0][0] == pytest.approx(alone["adapter"][0][0], rel=1e-6)  # an adapter begins as nothing
    assert alone["plain"][3] != pytest.approx(alone["adapter"][3], rel=1e-3)


@pytest.mark.parametrize("world", [2, 4])
def test_more_ranks_change_nothing(world: int, alone: dict[str, list[list[float]]], tmp_path: Path) -> None:
    """Four ranks are two replicas of two shards."""
    for name, rows in run(world, tmp_path / "w").items():
        for (loss, norm), (expected_loss, expected_norm) in zip(rows, alone[name], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5), name
            assert norm == pytest.approx(expected_norm, rel=3e-5), name
