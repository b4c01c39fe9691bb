"""A cluster of several real raylets on this machine, made by cluster/local.sh, and a client of it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo_ray.deploy.ray_jobs.jobs import look
from dpo_ray.deploy.ray_jobs.server import connect

REPOSITORY = Path(__file__).resolve().parents[2]
LOCAL = REPOSITORY / "cluster" / "local.sh"


@dataclass
class LocalCluster:
    """Its address, the environment of a client that may speak to it, and the client's directory."""

    url: str
    environment: dict[str, str]
    directory: Path

    def call(self, *arguments: str, **changes: str) -> tuple[int, str, str]:
        """Run `dpo-ray ARGUMENTS` as a person would; returns (exit code, standard output, standard error)."""
        done = subprocess.run(
            [sys.executable, "-m", "dpo_ray", *arguments],
            env=self.environment | changes,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        return done.returncode, done.stdout, done.stderr

    def local(self, *arguments: str) -> str:
        """Run `cluster/local.sh ARGUMENTS` of this cluster; returns what it prints."""
        done = subprocess.run(
            [LOCAL, *arguments], env=self.environment, check=True, capture_output=True, text=True, timeout=180
        )
        return done.stdout

    def wait_for(self, what: str, job: str, seconds: float = 300) -> None:
        """Wait until a job has printed a pattern."""
        client, until = connect(self.url), time.monotonic() + seconds
        while not re.search(what, client.get_job_logs(job)):
            assert not look(client, job).is_over, client.get_job_logs(job)
            assert time.monotonic() < until, client.get_job_logs(job)
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def local_cluster(directory: Path, *options: str, subnet: str | None = None) -> Iterator[LocalCluster]:
    """Start a cluster for the `with` block.

    Args:
        options: of `cluster/local.sh up`.
        subnet: with `--namespaces`: the first three numbers of the nodes' addresses.
    """
    state, dashboard = f"/tmp/dpo-ray-test-{os.getpid()}", free_port()  # noqa: S108 - sockets want short paths
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DPO_RAY_"))}
    base = clean | {"DPO_RAY_LOCAL_STATE": state, "PYTHONPATH": str(REPOSITORY), "RAY_worker_niceness": "0"}
    base |= {"DPO_RAY_LOCAL_SUBNET": subnet, "DPO_RAY_LOCAL_BRIDGE": "dporaytest"} if subnet else {}
    ports = ["--dashboard-port", str(dashboard), "--gcs-port", str(free_port())]
    url = f"http://{f'{subnet}.10' if subnet else '127.0.0.1'}:{dashboard}"
    try:
        subprocess.run([LOCAL, "up", *options, *ports], env=base, check=True, timeout=180)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RAY_AUTH_TOKEN", raising=False)
            patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
            token: Mapping[str, str] = {"RAY_AUTH_TOKEN_PATH": f"{state}/token"} if "--token" in options else {}
            for name, value in token.items():
                patch.setenv(name, value)
            yield LocalCluster(url, {**base, "DPO_RAY_ADDRESS": url, **token}, directory)
    finally:
        subprocess.run([LOCAL, "down"], env=base, check=True, timeout=60)
