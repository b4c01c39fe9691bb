"""A storage that fails is named by its first failure, as an error after which no further attempt is made."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.workers import may_mend
from dpo_ray.errors import StorageFailedError, WriteRefusedError
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from tests.unit.train.checkpoint.test_checkpoint import advance, make


@contextmanager
def files_limited(limit_bytes: int) -> Iterator[None]:
    """Make the kernel refuse larger files, as a full disk does. Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save(checkpoints: Checkpoints) -> None:
    policy, optimizer = make()
    advance(policy, optimizer, 0)
    checkpoints.save(policy, optimizer, Progress(1), [])
    checkpoints.finish()


@pytest.mark.parametrize("limit_bytes", [4_000, 24_500])  # DCP's files; those of the random generators
def test_a_disk_that_is_full_while_a_checkpoint_is_written(limit_bytes: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path), "a-1", 2)
    with pytest.raises(WriteRefusedError, match="File too large") as caught, files_limited(limit_bytes):
        save(checkpoints)
    assert not may_mend(caught.value)
    assert str(tmp_path) in caught.value.where
    assert "Traceback" not in str(caught.value)


def test_an_object_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # of a server of another test, whose address it would keep
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    settings = {"ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "DEFAULT_REGION": "us-east-1"}
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "MAX_ATTEMPTS": "2", **settings}.items():
        monkeypatch.setitem(os.environ, f"AWS_{name}", value)
    boto3.client("s3").create_bucket(Bucket="gone")
    checkpoints = Checkpoints(Storage("s3://gone/here"), "a-1", 2)
    server.stop()
    with pytest.raises(StorageFailedError) as caught:
        save(checkpoints)
    assert not may_mend(caught.value)
    assert caught.value.where.startswith("s3://gone/here")
    assert "Could not connect" in caught.value.what
    assert "Traceback" not in str(caught.value)
