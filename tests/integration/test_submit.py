"""Runs on a real Ray cluster by its job server: submitted, followed, stopped by way of a checkpoint, and gone on with."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from dpo_ray.deploy.ray_jobs.jobs import look, stop
from dpo_ray.deploy.ray_jobs.logs import follow
from dpo_ray.deploy.ray_jobs.server import connect
from tests.helpers.local_cluster import LocalCluster, free_port, local_cluster
from tests.integration.conftest import small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 240  # long enough to be stopped in the middle


class Cluster(LocalCluster):
    """Two nodes that want a token."""

    def recipe(self, name: str, *overrides: str) -> str:
        """Write a small recipe; all share one output, so one prepares and scores for the others."""
        values = small_recipe(self.directory / "runs", f"name={name}", *overrides).model_dump(
            mode="json", exclude_unset=True
        )
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster(tmp_path_factory.mktemp("submit"), "--nodes", "2", "--token") as made:
        yield Cluster(**vars(made))


def test_a_run_goes_through_and_its_exit_code_is_ours(cluster: Cluster) -> None:
    code, out, err = cluster.call("submit", cluster.recipe("through"), "train.steps=4", "--wait")
    assert code == 0, out + err
    assert "submitted through-1: recipe.yaml" in out
    assert "through-1: done" in err
    assert re.search(r"^rows_in=96 admitted=96 .* steps=4 .* audit=passed", out, re.MULTILINE)
    assert (cluster.directory / "runs" / "through" / "report.html").exists()
    code, out, _ = cluster.call("list", "--json")
    (listed,) = json.loads(out)
    assert (code, listed["id"], listed["code"], listed["attempt"]) == (0, "through-1", 0, 1)
    assert re.fullmatch("[0-9a-f]{64}", listed["recipe_sha256"])


def test_stopped_by_way_of_a_checkpoint_and_gone_on_with(cluster: Cluster) -> None:
    recipe = cluster.recipe("long", f"train.steps={STEPS}", "train.checkpoint_every_steps=null")
    code, out, err = cluster.call("submit", recipe)
    assert code == 0, err
    assert "dpo-ray logs long-1 -f" in out
    cluster.wait_for(r"train: [1-9]\d*/", "long-1")

    code, _, err = cluster.call("submit", recipe)
    assert code == 5
    assert "this run is already active: it is the job long-1, which runs" in err

    code, out, err = cluster.call("stop", "long-1")
    assert code == 0, err
    assert "long-1: asked to stop; it ends after its step and a checkpoint" in out
    words = re.search(rf"long-1: stopped with a checkpoint after step (\d+) of {STEPS}; submit again to go on", out)
    assert words
    code, out, _ = cluster.call("status", "long-1", "--json")
    assert (json.loads(out)["exit_code"], json.loads(out)["code"]) == (75, 75)
    code, out, err = cluster.call("logs", "long-1", "-f")
    stopped = re.search(rf"and stopped after step (\d+) of {STEPS}", out)
    assert stopped
    assert (code, stopped[1]) == (75, words[1])

    code, out, err = cluster.call("submit", recipe, "--wait")
    assert code == 0, out + err
    assert "submitted long-2" in out
    assert f"resuming from the checkpoint of step {stopped[1]}" in out
    assert f"steps={STEPS}" in out
    assert "prepare: started" not in out
    assert "-stop" not in cluster.call("list")[1]


def test_a_run_that_fails_gives_its_own_exit_code(cluster: Cluster) -> None:
    code, out, err = cluster.call("submit", cluster.recipe("broken"), "data.train=/nowhere/train.jsonl", "--wait")
    assert code in (2, 3)
    assert "/nowhere/train.jsonl" in out
    assert f"broken-1: failed with exit code {code}" in err


def test_what_the_cluster_refuses_is_one_line_for_every_command(cluster: Cluster, tmp_path: Path) -> None:
    recipe, no_home = cluster.recipe("refused"), {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": ""}
    for command in (["submit", recipe], ["status", "x"], ["logs", "x"], ["stop", "x"], ["list"]):
        code, out, err = cluster.call(*command, RAY_AUTH_TOKEN="wrong")
        assert (code, out, err.count("\n")) == (9, "", 2)
        assert "the cluster refuses the token from RAY_AUTH_TOKEN" in err
    code, _, err = cluster.call("list", **no_home)
    assert code == 9
    assert "the cluster requires a token, and none was found on this machine" in err
    code, _, err = cluster.call("list", "--address", f"http://127.0.0.1:{free_port()}")
    assert code == 9
    assert "nothing listens at the address" in err
    for command in (["status", "x"], ["logs", "x"], ["logs", "x", "-f"], ["stop", "x"]):
        code, out, err = cluster.call(*command)
        assert (code, out) == (2, "")
        assert "there is no such job" in err


def test_another_dpo_ray_on_the_cluster_is_said_in_the_log(cluster: Cluster) -> None:
    client = connect(cluster.url)
    job = client.submit_job(entrypoint="python -m dpo_ray.deploy.ray_jobs.same_versions dpo-ray==0.9.0 && echo began")
    lines: list[str] = []
    assert follow(client, job, lines.append).code == 9
    assert "the run was submitted by dpo-ray 0.9.0" in "".join(lines)
    assert "\nbegan" not in "".join(lines)


def test_a_job_without_a_driver_of_ours_is_stopped_by_ray(cluster: Cluster) -> None:
    client, said = connect(cluster.url), []
    job = client.submit_job(entrypoint="sleep 600")
    while look(client, job).status == "PENDING":
        time.sleep(0.5)
    ended = stop(client, job, 60, said.append)
    assert ended.status == "STOPPED"
    assert said == [f"{job}: stopped by Ray, without a checkpoint of its own"]


class Breaking:
    """A TCP proxy before the dashboard that breaks all its connections, again and again."""

    def __init__(self, port: int) -> None:
        self._port, self._open = port, list[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.broken = 0

    def serve(self) -> None:
        with suppress(OSError):  # closed, as the test ends
            while True:
                client, _ = self._server.accept()
                upstream = socket.create_connection(("127.0.0.1", self._port))
                self._open += [client, upstream]
                for source, target in ((client, upstream), (upstream, client)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def break_all(self) -> None:
        found, self._open = self._open, []
        for each in found:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
                self.broken += 1
            each.close()

    def close(self) -> None:
        self._server.close()
        self.break_all()


@contextmanager
def breaking(url: str, every_seconds: float) -> Iterator[Breaking]:
    proxy, ended = Breaking(int(url.rsplit(":", 1)[1])), threading.Event()

    def strike() -> None:
        while not ended.wait(every_seconds):
            proxy.break_all()

    for work in (proxy.serve, strike):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield proxy
    finally:
        ended.set()
        proxy.close()


def test_following_survives_connections_that_break(cluster: Cluster) -> None:
    """Lines of odd lengths over half a minute, through a proxy that breaks every few seconds: each comes once."""
    program = "for i in $(seq 150); do echo $i $(seq $((i % 40))); sleep 0.2; done; printf 'no end of line'"
    client = connect(cluster.url)
    job = client.submit_job(entrypoint=program)
    written: list[str] = []
    with breaking(cluster.url, every_seconds=4) as proxy:
        ended = follow(connect(proxy.url), job, written.append)
        assert proxy.broken > 4
    assert ended.code == 0
    assert "".join(written) == client.get_job_logs(job)
    assert "".join(written).endswith("no end of line")
