"""SIGKILL the driver while it scores and trains at the same time: rerun, and the end is bit for bit that of a quiet run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]

RECIPE = {
    "name": "chaos",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {
        "train": {"type": "synthetic", "pairs": 640},
        "eval": {"type": "synthetic", "pairs": 64},
        "chat_template": "plain",
        "max_length_tokens": 128,
        "rows_per_part": 128,
    },
    "reference": {"groups_per_granule": 16},
    "train": {
        "workers": 2,
        "groups_per_step": 16,
        "epochs": 2,
        "optimizer": {"learning_rate": 3e-4},
        "checkpoint_every_steps": 4,
        "eval_every_steps": 20,
    },
    "evaluate": {"sample_prompts": 0, "max_new_tokens": 48},
}
STEPS, SEQUENCES = 80, 2 * (640 + 64)


def command(root: Path, mode: str) -> list[str]:
    path = root / "recipe.yaml"
    if not path.exists():
        root.mkdir()
        path.write_text(yaml.safe_dump(RECIPE | {"output": str(root / "out")}))
    return [sys.executable, "-m", "dpo_ray", "run", str(path), f"reference.mode={mode}"]


def finish(root: Path, mode: str) -> None:
    done = subprocess.run(command(root, mode), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


def kill_when(root: Path, pattern: str, count: int) -> None:
    """Start the run, SIGKILL its driver when it has made so many files, and see that it had not ended by itself."""
    line, before = command(root, "streaming"), set(files(root, pattern))
    with (root / "log").open("w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while len(set(files(root, pattern)) - before) < count:
            assert process.poll() is None, (root / "log").read_text()
            assert time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL


def files(root: Path, pattern: str) -> list[Path]:
    return list((root / "out").glob(pattern))


# Moments in their order, by how many new files of what kind show them; each goes on where the kill before has left it.
MOMENTS = {
    "the first granules are scored": ("reference-store/*/segment-*.parquet", 3),
    "the first bucket is written": ("artifacts/.staging/chaos/schedule-*/train/rank-00001/step-000000000.parquet", 1),
    "training is started": ("artifacts/.staging/chaos/train-*.json", 1),
    "training has a checkpoint": ("chaos/checkpoints/*/step-*.json", 1),
}


def weights(root: Path) -> str:
    (file,) = files(root, "artifacts/train-*/policy/model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def contents(root: Path) -> dict[str, str]:
    """Digest all files of the artifacts `reference` and `schedule`."""
    places = [place for stage in ("reference", "schedule") for place in files(root, f"artifacts/{stage}-*")]
    found = [f for place in places for f in place.rglob("*.parquet")]
    home = root / "out" / "artifacts"
    return {str(f.relative_to(home)): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


@pytest.mark.long  # in CI: test_kill_driver.py
def test_a_driver_killed_while_it_streams_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    finish(quiet, "streaming")
    for name, moment in MOMENTS.items():
        kill_when(killed, *moment)
        print(f"killed when {name}")
    finish(killed, "streaming")
    assert weights(killed) == weights(quiet)
    assert contents(killed) == contents(quiet)
    steps = [json.loads(text)["step"] for text in (killed / "out" / "chaos" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    keys = [pq.read_table(f, columns=["key"])["key"] for f in files(killed, "reference-store/*/segment-*.parquet")]
    assert len({key for column in keys for key in column.to_pylist()}) <= SEQUENCES
    staging = killed / "out" / "artifacts" / ".staging"
    assert [p for p in staging.rglob("*") if p.is_file()] == []  # what the dead attempts left is swept
