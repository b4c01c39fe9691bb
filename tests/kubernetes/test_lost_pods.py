"""Pods of each role are killed while they work: the run goes on from what was committed, and `--wait` tells of it."""

from __future__ import annotations

import re
import time

import pytest

from dpo_ray.deploy.kubernetes.client import RAY_JOB
from dpo_ray.errors import StoppedError
from tests.helpers.real_cluster import HAS_CHECKPOINT, LONG, SMALL, RealCluster, until

MANY_PAIRS = "data.train=[{type: synthetic, pairs: 12800}]"


def test_an_engine_is_killed_while_it_scores(here: RealCluster) -> None:
    with here.run("lost-engine", *SMALL, MANY_PAIRS) as run:
        run.wait_for(r"reference: [\d,]+/", 600)
        pod = here.kill("lost-engine", "engines")
        assert run.wait_for(f"engines: lost pod {pod}", 60) > 0
        run.wait_for("engines: regained", 120)
        run.wait_for("train: started", 600)


def test_a_pod_of_data_tasks_is_killed(here: RealCluster) -> None:
    with here.run("lost-data", *SMALL, MANY_PAIRS) as run:
        run.wait_for("prepare: started", 120)
        pod = until("a pod of the group cpu", lambda: here.pods("lost-data", "cpu"), 60)[0]["metadata"]["name"]
        here.kill("lost-data", "cpu")
        assert pod
        run.wait_for("reference: started", 600)


def test_a_training_pod_is_killed_and_training_goes_on_within_a_minute(here: RealCluster) -> None:
    with here.run("lost-training", *LONG) as run:
        run.wait_for(HAS_CHECKPOINT, 600)
        pod = here.kill("lost-training", "training")
        lost = run.wait_for(f"training: lost pod {pod}", 60)
        back = run.wait_for("resuming from the checkpoint of step [1-9]", 120)
        assert back - lost < 60
        assert here.job("lost-training")["status"].get("failed", 0) == 0


def test_the_head_is_killed_and_the_only_retry_is_enough(here: RealCluster) -> None:
    with here.run("lost-head", *LONG, "cluster.kubernetes.retries=1") as run:
        run.wait_for(HAS_CHECKPOINT, 600)
        here.kill("lost-head", "headgroup")
        run.wait_for("head: lost pod|the head, and the driver with it, is gone", 60)
        run.wait_for("resuming from the checkpoint of step [1-9]", 600)
        status = here.job("lost-head")["status"]
        assert status.get("failed", 0) <= 1
        assert not re.search("wait for it or stop it", run.text)


@pytest.mark.parametrize("seconds", [5, 90])
def test_a_suspended_run_goes_on(here: RealCluster, seconds: int) -> None:
    name = f"suspended-{seconds}"
    with here.run(name, *LONG, "cluster.kubernetes.retries=1") as run:
        run.wait_for(HAS_CHECKPOINT, 600)
        here.connection.change(RAY_JOB, here.namespace, name, {"spec": {"suspend": True}})
        run.wait_for("suspend", 60)
        time.sleep(seconds)
        here.connection.change(RAY_JOB, here.namespace, name, {"spec": {"suspend": False}})
        run.wait_for("resuming from the checkpoint of step [1-9]", 600)
        assert here.job(name)["status"].get("failed", 0) == 0


def test_a_run_that_was_deleted_goes_on_when_it_is_applied_again(here: RealCluster) -> None:
    with here.run("again", *LONG) as run:
        run.wait_for(HAS_CHECKPOINT, 600)
        here.connection.delete(RAY_JOB, here.namespace, "again")
        assert run.end(120) == StoppedError.exit_code, run.text
        assert "was deleted before it had finished" in run.text
        until("no pod", lambda: not here.pods("again"), 60)
        with here.run("again", *LONG) as second:
            second.wait_for("resuming from the checkpoint of step [1-9]", 600)
            assert "prepare: started" not in second.text


def test_a_stopped_run_leaves_a_checkpoint_and_goes_on_from_it(here: RealCluster) -> None:
    with here.run("stopped", *LONG, "train.checkpoint_every_steps=1000") as run:
        run.wait_for(HAS_CHECKPOINT, 600)
        done = here.dpo_ray("kubernetes", "stop", "stopped", "--namespace", here.namespace)
        assert done.returncode == 0, done.stderr
        assert here.connection.get(RAY_JOB, here.namespace, "stopped") is None
        run.end(60)
        with here.run("stopped", *LONG, "train.checkpoint_every_steps=1000") as second:
            second.wait_for("resuming from the checkpoint of step [1-9]", 600)
