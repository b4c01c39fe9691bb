"""The operator and the API server restart while a run works: neither the run nor who watches it notices for long."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.helpers.real_cluster import LONG, SMALL, RealCluster, until

OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def test_the_operator_restarts(here: RealCluster) -> None:
    from kubernetes import client

    core = client.CoreV1Api(here.connection.client())
    labels = ",".join(f"{key}={value}" for key, value in OPERATOR.items())
    found = core.list_pod_for_all_namespaces(label_selector=labels).items
    if not found:
        pytest.skip("the operator is not a pod with the label of its Helm chart")
    with here.run("operator", *SMALL) as run:
        run.wait_for("train: started", 600)
        for pod in found:
            core.delete_namespaced_pod(pod.metadata.name, pod.metadata.namespace, grace_period_seconds=0)
        assert run.end(600) == 0, run.text
        assert here.job("operator")["status"].get("failed", 0) == 0


def test_the_api_server_restarts_and_the_watcher_waits_for_it(here: RealCluster) -> None:
    restart = os.environ.get("DPO_RAY_TEST_RESTART_API")
    if not restart:
        pytest.skip("DPO_RAY_TEST_RESTART_API names no command that restarts the API server")
    with here.run("outage", *SMALL) as run:
        run.wait_for("train: started", 600)
        subprocess.run(["bash", "-c", restart], check=True, timeout=300)
        assert run.end(600) == 0, run.text
        assert "the API server does not answer" in run.text
        assert "the API server answers again" in run.text
        assert "urllib3" not in run.text


def test_two_runs_at_once_share_the_volume(here: RealCluster) -> None:
    with here.run("first", *SMALL) as first, here.run("second", *SMALL, "seed=1") as second:
        assert first.end(900) == 0, first.text
        assert second.end(900) == 0, second.text


def test_ctrl_c_ends_the_command_and_not_the_run(here: RealCluster) -> None:
    with here.run("left-alone", *LONG) as run:
        run.wait_for("prepare: started", 600)
        run.process.send_signal(signal.SIGINT)
        assert run.end(30) == 130
        assert "the run goes on without this command" in run.text
        time.sleep(5)
        assert here.job("left-alone")["status"]["jobStatus"] == "RUNNING"
        watching = here.start("kubernetes", "logs", "left-alone", "-f", "--namespace", here.namespace)
        watching.wait_for("train: started", 600)
        watching.process.kill()
        until("it still runs", lambda: here.job("left-alone")["status"]["jobStatus"] == "RUNNING", 5)
