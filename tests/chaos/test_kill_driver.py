"""SIGKILL the driver in every stage, rerun the same command each time: the end is bit for bit that of a quiet run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]

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
    "reference": {"groups_per_granule": 64},
    "train": {
        "workers": 2,
        "groups_per_step": 32,
        "optimizer": {"learning_rate": 3e-4},
        "checkpoint_every_steps": 4,
        "eval_every_steps": 10,
    },
    "evaluate": {"sample_prompts": 16, "max_new_tokens": 48},
}


def command(root: Path, mode: str = "ahead") -> list[str]:
    path = root / "recipe.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(RECIPE | {"output": str(root / "out")}))
    return [sys.executable, "-m", "dpo_ray", "run", str(path), f"reference.mode={mode}"]


def finish(root: Path, mode: str = "ahead") -> str:
    done = subprocess.run(command(root, mode), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def kill_when(root: Path, mode: str, reached: Callable[[], bool]) -> None:
    """Start the run, SIGKILL its driver as soon as `reached`, and see that it had not ended by itself."""
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command(root, mode), stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None, (root / "log").read_text()
            assert time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL


def exists(root: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any((root / "out").glob(pattern))


# Where each stage is under way, by what it has written, in the order of the stages.
MOMENTS = {
    "shard": lambda root: exists(root, "artifacts/.staging/chaos/shard-*/groups/*.parquet"),
    "prepare": lambda root: exists(root, "artifacts/.staging/chaos/prepare-*.json"),
    "reference": lambda root: exists(root, "reference-store/*/segment-*.parquet"),
    "join": lambda root: exists(root, "artifacts/.staging/chaos/reference-*.json"),
    "schedule": lambda root: exists(root, "artifacts/.staging/chaos/schedule-*.json"),
    "train": lambda root: exists(root, "chaos/checkpoints/*/step-*.json"),
    "evaluate": lambda root: exists(root, "artifacts/train-*/manifest.json"),
}
# While all is scored, scheduled and trained on concurrently, before and after the first checkpoint.
FEW_MOMENTS = ("reference", "train")


def weights(root: Path) -> str:
    (file,) = (root / "out" / "artifacts").glob("train-*/policy/model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def stored(root: Path) -> tuple[dict[bytes, list[float]], int]:
    """Read a run's store: log-probs by key, and the rows of all segments."""
    segments = [pq.read_table(file) for file in sorted((root / "out" / "reference-store").glob("*/segment-*.parquet"))]
    table = pa.concat_tables(segments)
    return dict(zip(table["key"].to_pylist(), table["token_logps"].to_pylist(), strict=True)), len(table)


def counts(line: str) -> str:
    """Cut off the report's place, and how many sequences the last attempt scored and how many it found."""
    return re.sub(r" (scored|known)=\d+", "", line.split(" report=")[0])


@pytest.mark.long  # in CI: a driver that is killed in training, in test_fault_matrix.py
@pytest.mark.parametrize(
    ("mode", "stages"),
    [("streaming", FEW_MOMENTS), ("ahead", tuple(MOMENTS))],
)
def test_a_driver_killed_in_every_stage_ends_as_an_undisturbed_one(
    mode: str, stages: tuple[str, ...], tmp_path: Path
) -> None:
    """The undisturbed run scores everything before it trains, so streaming has to end with its bits as well."""
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    killed.mkdir()
    undisturbed = finish(quiet)
    for stage in stages:
        kill_when(killed, mode, MOMENTS[stage](killed))
        print(f"killed in {stage}")
    last = finish(killed, mode)
    assert counts(last) == counts(undisturbed)
    assert "rows_in=640 admitted=640 quarantined=0 left_out=0 duplicates=0 steps=20" in last
    assert weights(killed) == weights(quiet)
    steps = [json.loads(text)["step"] for text in (killed / "out" / "chaos" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))
    values, rows = stored(killed)
    assert values.keys() == stored(quiet)[0].keys()
    assert (
        rows - len(values) <= 2 * 2 * RECIPE["reference"]["groups_per_granule"]
    )  # no more than the open granules again
    staging = killed / "out" / "artifacts" / ".staging"
    assert [p for p in staging.rglob("*") if p.is_file()] == []  # what the dead attempts left is swept


def test_the_second_driver_names_the_first_and_leaves(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command(tmp_path), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while not exists(tmp_path, "chaos/lease-*.json")():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=300)
        assert second.returncode == 5
        assert f"pid {first.pid}" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.kill()
        first.wait()
