"""Training by two workers of Ray Train, disturbed in every way: the end is bit for bit that of a quiet run.

What happens is in training.py, a program of its own; here it is judged.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.helpers.chaos_training import EVERY, MOMENTS, STEPS
from tests.helpers.traps import POINTS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
PROGRAM = Path(__file__).resolve().parents[1] / "helpers" / "chaos_training.py"


def started(directory: Path, *scenes: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(directory), *scenes]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def played(directory: Path, *scenes: str) -> list[dict[str, Any]]:
    """Play scenes to their end; returns the accounts of their runs."""
    process = started(directory, *scenes)
    said, _ = process.communicate(timeout=1700)
    assert process.returncode == 0, said
    return [json.loads(line) for line in said.splitlines() if line.startswith('{"run"')]  # Ray writes there as well


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def scenes(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Play the scenes of every CI run in one program, as each would start a Ray of its own; return their runs by directory."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for account in played(directory, "quiet", "hang"):
        runs.setdefault(account["run"].rsplit(" ", 1)[0], []).append(account)
    return runs


@pytest.fixture(scope="module")
def quiet(scenes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    (account,) = scenes["quiet"]
    assert account["attempts"] == [list(range(STEPS + 1))]
    return account


def check_attempts(attempts: list[list[int]]) -> None:
    """Every attempt goes on from a checkpoint, and does again no more than a checkpoint was due and one in flight."""
    for (*_, last), (restored, *steps) in itertools.pairwise(attempts):
        assert restored % EVERY == 0
        assert last - restored < 2 * EVERY
        assert steps == list(range(restored + 1, restored + 1 + len(steps)))
    assert attempts[-1][-1] == STEPS


@pytest.mark.long  # without Ray: tests/unit/train/test_kill_ranks.py
def test_workers_killed_at_every_point_of_a_step_and_of_a_commit(directory: Path, quiet: dict[str, Any]) -> None:
    (account,) = played(directory, "points")
    assert not any((directory / "points" / "points").iterdir())  # every trap has closed
    assert len(account["attempts"]) == len(POINTS) + 1
    check_attempts(account["attempts"])
    assert account["weights"] == quiet["weights"]
    assert account["losses"] == quiet["losses"]


@pytest.mark.long
def test_workers_killed_at_random_moments(directory: Path, quiet: dict[str, Any]) -> None:
    (account,) = played(directory, "moments")
    assert len(account["attempts"]) == MOMENTS + 1
    check_attempts(account["attempts"])
    assert account["weights"] == quiet["weights"]
    assert account["losses"] == quiet["losses"]


@pytest.mark.long  # without Ray: tests/unit/train; with fewer workers and more again in CI: test_lose_nodes.py
def test_another_number_of_workers_goes_on_with_the_same_steps(directory: Path, quiet: dict[str, Any]) -> None:
    two, one, four = played(directory, "sizes")
    assert two["error"]
    assert one["error"]
    assert [account["attempts"][0][0] for account in (two, one, four)] == [0, EVERY, 2 * EVERY]
    assert four["attempts"][-1][-1] == STEPS
    assert four["losses"] == pytest.approx(quiet["losses"], abs=1e-5)


def test_a_hung_worker_is_found_and_the_group_starts_again(
    scenes: dict[str, list[dict[str, Any]]], quiet: dict[str, Any]
) -> None:
    (again,) = scenes["hang"]
    assert again["weights"] == quiet["weights"]
    assert len(again["attempts"]) == 2
    assert any("rank 0 waited 15 s for another rank" in message for message in again["messages"])


@pytest.mark.long
def test_a_worker_that_hangs_more_often_than_allowed_ends_the_run(directory: Path) -> None:
    (account,) = played(directory, "hang for good")
    assert "rank 0 waited 15 s for another rank" in account["error"]
    assert "hang_seconds" in account["error"]


@pytest.mark.long
@pytest.mark.parametrize("whom", ["driver", "all"])
def test_a_killed_driver_and_all_killed(whom: str, tmp_path: Path, directory: Path, quiet: dict[str, Any]) -> None:
    rng, begun = random.Random(whom), 0
    (tmp_path / "schedule").symlink_to(directory / "schedule")
    checkpoints = tmp_path / "driver" / "checkpoints"
    for _ in range(2):
        process = started(tmp_path, "driver")
        deadline = time.monotonic() + 120
        while len(list(checkpoints.glob("step-*.json"))) == 0 or newest(checkpoints) <= begun:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        begun = newest(checkpoints)
        victims = [psutil.Process(process.pid)]
        if whom == "all":
            victims += victims[0].children(recursive=True)
        for victim in victims:
            victim.kill()
        process.communicate(timeout=60)
    (account,) = played(tmp_path, "driver")
    assert account["attempts"][0][0] >= begun
    assert account["weights"] == quiet["weights"]
    assert account["losses"] == quiet["losses"]


def newest(checkpoints: Path) -> int:
    steps = [int(f.stem.removeprefix("step-")) for f in checkpoints.glob("step-*.json")]
    return max(steps, default=0)


RECIPE = {
    "name": "sigterm",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {
        "train": {"type": "synthetic", "pairs": 640},
        "chat_template": "plain",
        "max_length_tokens": 128,
    },
    "train": {
        "workers": 2,
        "objective": {"type": "simpo"},  # no reference, so no engine
        "groups_per_step": 4,
        "optimizer": {"learning_rate": 3e-4},
        "checkpoint_every_steps": 1000,  # those that there are were wished for
    },
    "evaluate": {"sample_prompts": 0},
}


def command(root: Path) -> list[str]:
    root.mkdir(exist_ok=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"output": str(root / "out")}))
    return [sys.executable, "-m", "dpo_ray", "run", str(root / "recipe.yaml")]


def weights(root: Path) -> bytes:
    (file,) = (root / "out" / "artifacts").glob("train-*/policy/model.safetensors")
    return file.read_bytes()


@pytest.mark.long  # in CI a submitted run is stopped so: tests/integration/test_submit.py
@pytest.mark.parametrize("whom", ["driver", "all"])
def test_sigterm_ends_the_run_after_a_checkpoint_and_the_same_command_goes_on(whom: str, tmp_path: Path) -> None:
    subprocess.run(command(tmp_path / "quiet"), check=True, capture_output=True, timeout=600)
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(command(stopped), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(stopped, process, 10)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert "training was asked to stop, and stopped after step" in said
    (checkpoints,) = (stopped / "out" / "sigterm" / "checkpoints").iterdir()
    assert newest(checkpoints) >= 10
    if whom == "all":
        stop_all_processes(stopped, newest(checkpoints) + 10)
    subprocess.run(command(stopped), check=True, capture_output=True, timeout=600)
    assert weights(stopped) == weights(tmp_path / "quiet")


def stop_all_processes(root: Path, steps: int) -> None:
    """Send SIGTERM to all processes of a run, as an init system or Kubernetes does; what was committed is gone on from."""
    process = subprocess.Popen(command(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(root, process, steps)
    for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        if victim.is_running():
            os.kill(victim.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode in (75, 1), said  # 1: Ray ends its driver by itself once its own processes are gone


def wait_for_steps(root: Path, process: subprocess.Popen[str], steps: int) -> None:
    deadline, metrics = time.monotonic() + 300, root / "out" / "sigterm" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
