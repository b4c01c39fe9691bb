"""A whole run whose every artifact, checkpoint and report lies on an S3 server (moto, on loopback)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.integration.conftest import small_recipe


@pytest.fixture
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    request.node.server = server
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="runs")
    yield "runs"
    server.stop()


def run(recipe: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpo_ray", "run", str(recipe)]
    return subprocess.run(command, capture_output=True, text=True, timeout=560, env=dict(os.environ))


@pytest.mark.slow
def test_a_run_on_s3(bucket: str, tmp_path: Path) -> None:
    recipe = small_recipe(f"s3://{bucket}/here", "reference.engine=trainer", "train.steps=4")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    first = run(path)
    assert first.returncode == 0, first.stderr
    assert "rows_in=96 admitted=96 quarantined=0 left_out=0 duplicates=0 steps=4" in first.stdout.splitlines()[-1]
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    names = {o["Key"]: o["LastModified"] for o in listed}
    assert "here/small/report.html" in names
    assert sum(name.endswith("manifest.json") for name in names) == 5 + 2  # the stages, and a shard for each split
    assert not [name for name in names if "/checkpoints/" in name]  # served their purpose
    second = run(path)
    assert second.returncode == 0, second.stderr
    assert "nothing to run" in second.stderr
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    after = boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    assert {o["Key"]: o["LastModified"] for o in after} == names


@pytest.mark.slow
def test_a_server_that_is_gone_while_training_ends_the_run_at_once(
    bucket: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = small_recipe(
        f"s3://{bucket}/here", "reference.engine=trainer", "train.steps=100000", "train.checkpoint_every_steps=5"
    )
    path, s3 = tmp_path / "recipe.yaml", boto3.client("s3")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen([sys.executable, "-m", "dpo_ray", "run", str(path)], stdout=log, stderr=log)
    while not any("/step-" in o["Key"] for o in s3.list_objects_v2(Bucket=bucket).get("Contents", ())):
        assert driver.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.5)
    request.node.server.stop()
    assert driver.wait(120) == 9
    said = (tmp_path / "log").read_text()
    assert "Could not connect to the endpoint" in said
    assert "all start again" not in said
