"""Nodes of a cluster are lost in mid-training: one is killed, one is cut off, the head. Real raylets, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.deploy.ray_jobs.logs import follow
from dpo_ray.deploy.ray_jobs.server import connect
from tests.helpers.local_cluster import LocalCluster, local_cluster

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
STEPS, EVERY, TOLERANCE = 400, 10, 1e-5
TWO_NODES = {"train": {"cpus": 2, "node_labels": {"dpo/role": "train"}}}
"""A worker on each of two nodes, as a node has two CPUs."""

CLUSTER = ("--roles", "head,train,train", "--cpus", "2")


def recipe(directory: Path, output: Path) -> Path:
    """Write a run of some minutes, whose training may go on with one worker."""
    values = {
        "name": "struck",
        "output": str(output),
        "model": {"path": "builtin:sentiment_llama"},
        "data": {"train": {"type": "synthetic", "pairs": 400}, "chat_template": "plain", "max_length_tokens": 128},
        "reference": {"audit": {"groups": 16}},
        "train": {
            "workers": 2,
            "min_workers": 1,
            "steps": STEPS,
            "groups_per_step": 16,
            "tokens_per_micro_batch": 512,
            # Each update enlarges what another order of sums over ranks has rounded otherwise; eps keeps noise from moving weights.
            "optimizer": {"learning_rate": 5e-5, "eps": 1e-4},
            "checkpoint_every_steps": EVERY,
        },
        "evaluate": {"sample_prompts": 0},
        "cluster": {"roles": TWO_NODES},
    }
    path = directory / "struck.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def curve(output: Path) -> list[dict[str, Any]]:
    """Read the metrics of every step of the finished run."""
    (metrics,) = (output / "artifacts").glob("train-*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def check_same(output: Path, undisturbed: list[dict[str, Any]]) -> None:
    """Compare curves; a step that was left out or done twice moves the loss of the next by far more than is allowed."""
    found = curve(output)
    for exact in ("step", "num_tokens", "learning_rate"):
        assert [row[exact] for row in found] == [row[exact] for row in undisturbed]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(found, undisturbed, strict=True)) < TOLERANCE
    first, last = (sum(row["loss"] for row in rows) / 25 for rows in (undisturbed[:25], undisturbed[-25:]))
    assert (first - last) / STEPS > 2 * TOLERANCE  # what a step is worth


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run the same recipe on this machine alone, with two workers."""
    directory = tmp_path_factory.mktemp("undisturbed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DPO_RAY_"))}
    program = [sys.executable, "-m", "dpo_ray", "run", str(recipe(directory, directory / "runs"))]
    subprocess.run(program, env=environment, check=True, capture_output=True, timeout=900)
    return curve(directory / "runs")


def began(cluster: LocalCluster, output: Path, attempt: int = 1) -> str:
    """Submit the run, and wait until it trains and has a checkpoint; returns the job."""
    code, out, err = cluster.call("submit", str(recipe(cluster.directory, output)))
    assert code == 0, out + err
    cluster.wait_for(r"train: [1-9]\d+/", f"struck-{attempt}", seconds=400)
    return f"struck-{attempt}"


def test_a_killed_training_node_is_done_without_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    """That another number of workers takes the same steps to the same weights: test_kill_training.py."""
    output = tmp_path / "runs"
    with local_cluster(tmp_path, *CLUSTER) as cluster:
        job = began(cluster, output)
        cluster.local("kill-node", "2")
        cluster.wait_for("there are free resources for only 1 of 2 training workers", job)
        cluster.local("start-node", "2")
        lines: list[str] = []
        ended = follow(connect(cluster.url), job, lines.append)
    text = "".join(lines)
    assert ended.code == 0, text
    assert "training workers were lost" in text
    assert "there are free resources for more training workers" in text
    assert text.count("resuming from the checkpoint of step") >= 2
    assert [row["step"] for row in curve(output)] == list(range(1, STEPS + 1))


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_a_node_that_is_cut_off_is_found_missing_and_done_without(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    output = tmp_path / "runs"
    with local_cluster(tmp_path, *CLUSTER, "--namespaces", subnet="10.231.8") as cluster:
        job = began(cluster, output)
        cluster.local("cut-node", "2", "60")
        lines: list[str] = []
        ended = follow(connect(cluster.url), job, lines.append)
    text = "".join(lines)
    assert ended.code == 0, text
    assert "training workers were lost" in text
    assert "there are free resources for only 1 of 2 training workers" in text
    check_same(output, undisturbed)


@pytest.mark.long
def test_after_the_loss_of_the_head_the_same_submission_goes_on(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    output = tmp_path / "runs"
    with local_cluster(tmp_path, *CLUSTER) as cluster:
        began(cluster, output)
        cluster.local("kill-node", "0")
    with local_cluster(tmp_path, *CLUSTER) as cluster:
        code, out, err = cluster.call("submit", str(recipe(tmp_path, output)), "--wait")
    assert code == 0, out + err
    assert "resuming from the checkpoint of step" in out
    assert "prepare: started" not in out
    check_same(output, undisturbed)
