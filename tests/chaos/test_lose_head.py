"""Ray's head is killed while a run trains: the driver ends with one error that says what to do, and the run goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.conftest import small_recipe

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def gcs_of(driver: int) -> psutil.Process:
    """Find the head's process among those that a driver with a Ray of its own has started."""
    (found,) = [p for p in psutil.Process(driver).children(recursive=True) if "gcs_server" in p.name()]
    return found


def test_a_killed_head_is_one_error_and_the_same_command_goes_on(tmp_path: Path) -> None:
    recipe = small_recipe(
        tmp_path / "out", "train.objective={type: simpo}", "train.steps=300", "train.eval_every_steps=null"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "dpo_ray", "run", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not any((tmp_path / "out").glob("small/checkpoints/*/step-*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    gcs_of(process.pid).kill()
    killed = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 9, said
    assert time.monotonic() - killed < 55  # Ray itself would end it after 60 s, with code 1
    assert "Ray's head does not answer any more" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "resuming from the checkpoint of step" in again.stderr
