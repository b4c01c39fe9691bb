"""Runs that fail, on real Ray: the error is the last that they print, and the logs of a job outlive its cluster."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dpo_ray.deploy.ray_jobs.logs import follow
from dpo_ray.deploy.ray_jobs.server import connect
from tests.helpers.local_cluster import LocalCluster, local_cluster
from tests.integration.conftest import small_recipe

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
WITHOUT_ENGINES = ("train.objective={type: simpo}", "train.steps=1000", "train.max_failures=0")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("attempts"), "--nodes", "2", "--roles", "head,train") as made:
        yield made


def write_recipe(directory: Path, *overrides: str) -> Path:
    values = small_recipe(directory / "runs", *WITHOUT_ENGINES, *overrides).model_dump(mode="json", exclude_unset=True)
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def submit(cluster: LocalCluster, recipe: Path, **about: str) -> str:
    """Submit a recipe as the KubeRay operator does, with the metadata of its RayJob."""
    metadata = {"dpo_ray.recipe": "small", "dpo_ray.rayjob": "lab/small", "dpo_ray.retries": "3"}
    metadata |= {f"dpo_ray.{name}": value for name, value in about.items()}
    command = f"{sys.executable} -m dpo_ray run {recipe} ray.address=auto"
    return connect(cluster.url).submit_job(entrypoint=command, metadata=metadata)


def end(cluster: LocalCluster, job: str) -> tuple[int, list[str]]:
    """Return the exit code of a job and the lines that its driver has printed."""
    parts: list[str] = []
    return follow(connect(cluster.url), job, parts.append).code, "".join(parts).splitlines()


def about(directory: Path, attempt: int) -> dict[str, Any]:
    return json.loads((directory / f"runs/small/logs/attempt-{attempt}/attempt.json").read_text())


def kill_training_worker(cluster: LocalCluster) -> None:
    """Kill a training worker of this cluster; on a shared machine there may be those of others."""
    place = cluster.environment["DPO_RAY_LOCAL_STATE"]
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or ())
        and any(place in " ".join(parent.cmdline()) for parent in process.parents())
    ]
    assert workers
    workers[0].kill()


def test_the_logs_of_a_failed_attempt_stay_on_the_storage(cluster: LocalCluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    job = submit(cluster, recipe)
    cluster.wait_for(r"train: [1-9]\d*/", job)
    kill_training_worker(cluster)
    code, lines = end(cluster, job)
    assert code == 7, lines
    assert lines[-2].startswith("error: train: the workers failed"), lines[-12:]
    assert lines[-1].startswith("  -> fix the cause and run the same command"), lines[-12:]
    assert "Traceback" not in "\n".join(lines)
    assert (about(tmp_path, 1)["exit_code"], about(tmp_path, 1)["rayjob"]) == (7, "lab/small")
    logs = tmp_path / "runs/small/logs/attempt-1"
    until = time.monotonic() + 60
    while (logs / "driver.log").read_text().splitlines()[-1:] != lines[-1:]:
        assert time.monotonic() < until
        time.sleep(0.5)
    assert (logs / "driver.log").read_text().splitlines() == lines
    nodes = {file.parent.name for file in logs.glob("*/raylet.out")}
    assert len(nodes) == 2
    assert not (tmp_path / "runs/small/final-error.json").exists(), "another attempt may succeed"
    assert "attempt 1; its logs are kept in" in "\n".join(lines)


def test_an_error_that_would_come_again_is_found_once(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"chosen": 1}\n')
    recipe = write_recipe(tmp_path, f"data.train={tmp_path}/rows.jsonl")
    code, first = end(cluster, submit(cluster, recipe, applied="one"))
    assert code == 3, first
    began = time.monotonic()
    again, second = end(cluster, submit(cluster, recipe, applied="one"))
    assert again == code
    assert second[-2] == first[-2]
    assert (
        second[-1] == f"{first[-1]}; attempt 1 has found this, and so this attempt was not made: apply the RayJob again"
    )
    ours = [line for line in second if "job_manager" not in line and not line.startswith("Running entrypoint")]
    assert len(ours) == 2, second
    print(f"the second attempt took {time.monotonic() - began:.1f} s with its job")
    _, third = end(cluster, submit(cluster, recipe, applied="two"))
    assert third[-1] == first[-1]
    attempts = sorted(p.name for p in (tmp_path / "runs/small/logs").iterdir())
    assert attempts == ["attempt-1", "attempt-2"], "the attempt that was not made leaves no logs"
