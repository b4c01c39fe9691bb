"""What tools/audit.py makes of pip-audit's reports."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture
def finding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    return runpy.run_path(str(TOOLS / "audit.py"))["finding"]


def test_a_vulnerability_is_named_and_fails(finding, capsys: pytest.CaptureFixture[str]) -> None:
    vulnerable = {"name": "alpha", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
    sound = {"name": "beta", "version": "2.0", "vulns": []}
    assert finding({"dependencies": [vulnerable, sound]}, "cpu") == 1
    said = capsys.readouterr().out
    assert "alpha 1.0: PYSEC-1; mended in: 1.1" in said
    assert "2 of 2 packages looked up, 1 vulnerabilities" in said


def test_sound_packages_pass(finding, capsys: pytest.CaptureFixture[str]) -> None:
    assert finding({"dependencies": [{"name": "beta", "version": "2.0", "vulns": []}]}, "cpu") == 0
    assert "1 of 1 packages looked up, 0 vulnerabilities" in capsys.readouterr().out


@pytest.mark.parametrize(
    "report", ["no route to host", {"dependencies": [{"name": "alpha", "skip_reason": "not found on PyPI"}]}]
)
def test_without_a_database_it_is_skipped_with_a_word(finding, report, capsys: pytest.CaptureFixture[str]) -> None:
    assert finding(report, "cpu") == 0
    assert "skipped" in capsys.readouterr().out
