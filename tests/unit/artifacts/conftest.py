"""Storages to test on: a directory, and a bucket of a real S3 server on the loopback interface."""

from __future__ import annotations

import os
import pickle  # noqa: TID251 (what Ray does with arguments)
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import Artifact

BUCKET = "test-bucket"


@dataclass
class S3Server:
    """A server that ran through no mock of the client: requests are real, and their headers are kept."""

    url: str
    conditional_puts: list[str] = field(default_factory=list)  # paths of the PUTs with If-None-Match: *


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    handle = S3Server(f"http://{host}:{port}")
    inner, writes = server._server.app, threading.Lock()

    def application(environ: dict, start_response: Callable) -> object:
        if environ["REQUEST_METHOD"] != "PUT":
            return inner(environ, start_response)
        if environ.get("HTTP_IF_NONE_MATCH") == "*":
            handle.conditional_puts.append(environ["PATH_INFO"])
        with writes:  # moto looks and then writes; S3 does both in one step
            return inner(environ, start_response)

    server._server.app = application
    settings = {
        "AWS_ENDPOINT_URL": handle.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(BUCKET)
    yield handle
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return an empty storage, once on a disk and once in a bucket."""
    if request.param == "disk":
        return Storage(tmp_path / "root")
    request.getfixturevalue("s3_server")
    return Storage(f"s3://{BUCKET}/{secrets.token_hex(6)}")


@pytest.fixture
def s3(s3_server: S3Server) -> Storage:
    return Storage(f"s3://{BUCKET}/{secrets.token_hex(6)}")


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "root")


def commit(staging: Staging, entries: list[FileEntry], **changes: object) -> Artifact:
    """Commit with plain values for what a test does not care about."""
    facts: dict = {
        "stage_version": 1,
        "rows": {"in": 3, "admitted": 3},
        "inputs": {"data": "0" * 64},
        "config": {"max_length_tokens": 8},
        "figures": {"tokens": 12.5},
        "versions": {"pyarrow": "26.0.1"},
        "seconds": 1.0,
    }
    return staging.commit(entries, **{**facts, **changes})


def sent(value: Any) -> Any:
    """Return what a worker receives when a value is sent to it."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def write_all(staging: Staging, files: dict[str, bytes]) -> list[FileEntry]:
    return [staging.write(name, data) for name, data in files.items()]


FILES = {"part-0.parquet": b"PAR1 one" * 40, "model/weights.safetensors": bytes(range(256)) * 3, "empty": b""}
