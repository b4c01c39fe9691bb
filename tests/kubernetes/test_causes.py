"""What keeps a run from starting is told by `watch` within 15 s, with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.helpers.real_cluster import ROOT, SMALL, Command, RealCluster

RECIPE = str(ROOT / "pipelines" / "quickstart.yaml")
WITHIN_SECONDS = 15


@contextmanager
def applied(here: RealCluster, name: str, *overrides: str) -> Iterator[Command]:
    with here.run(name, *SMALL, *overrides) as run:
        run.wait_for(f"RayJob/{name}: applied", 60)
        yield run


def told(run: Command, pattern: str) -> float:
    """Return how many seconds after the RayJob was applied a cause was told."""
    began = run.wait_for("RayJob/.*: applied", 60)
    return run.wait_for(pattern, 60) - began


def test_an_image_that_cannot_be_pulled(here: RealCluster) -> None:
    with applied(here, "no-image", "cluster.kubernetes.image=localhost:9/dpo-ray:none") as run:
        assert told(run, r"waits: .*head.*the image localhost:9/dpo-ray:none cannot be pulled") < WITHIN_SECONDS
        run.wait_for("-> check cluster.kubernetes.image", 5)


def test_a_claim_without_a_volume(here: RealCluster) -> None:
    storage = "cluster.kubernetes.storage={claim: nowhere, create_gib: 1, storage_class: there-is-none}"
    with applied(here, "no-volume", storage) as run:
        assert told(run, "waits: .*head.*nowhere") < WITHIN_SECONDS
    from kubernetes import client

    core = client.CoreV1Api(here.connection.client())
    core.delete_namespaced_persistent_volume_claim("nowhere", here.namespace)


def test_a_claim_that_does_not_exist_is_refused_before_anything_is_applied(here: RealCluster) -> None:
    storage = "cluster.kubernetes.storage={claim: absent}"
    done = here.dpo_ray("kubernetes", "apply", RECIPE, *here.overrides("no-claim", storage))
    assert done.returncode == 2
    assert f"{here.namespace}/absent" in done.stderr
    assert "applied" not in done.stdout


def test_no_node_has_a_gpu(here: RealCluster) -> None:
    gpus = "cluster.kubernetes.training={gpus: 1, cpus: 2, memory_gib: 4}"
    with applied(here, "no-gpu", gpus) as run:
        assert told(run, r"waits: .*training.*nvidia\.com/gpu") < WITHIN_SECONDS


def test_a_secret_that_does_not_exist(here: RealCluster) -> None:
    secret = "cluster.kubernetes.secrets=[{variable: HF_TOKEN, secret: absent, key: token}]"
    with applied(here, "no-secret", secret) as run:
        assert told(run, "waits: .*head.*secret.*absent") < WITHIN_SECONDS


def test_a_quota(here: RealCluster) -> None:
    from kubernetes import client

    core = client.CoreV1Api(here.connection.client())
    pods = len(core.list_namespaced_pod(here.namespace).items)
    core.create_namespaced_resource_quota(
        here.namespace, {"metadata": {"name": "few-pods"}, "spec": {"hard": {"pods": str(pods + 1)}}}
    )
    try:
        with applied(here, "no-quota") as run:
            assert told(run, "the quota `few-pods` is exceeded") < WITHIN_SECONDS
    finally:
        core.delete_namespaced_resource_quota("few-pods", here.namespace)


def test_a_pod_with_too_little_memory(here: RealCluster) -> None:
    """The kernel kills in it: the pod, its limit, what the planner expects and the field to change are named."""
    small = "cluster.kubernetes.training={memory_gib: 1}"
    with here.run("no-memory", *SMALL, small, "cluster.kubernetes.retries=0") as run:
        assert run.end(600) != 0
        assert "cluster.kubernetes.training.memory_gib" in run.text
        assert re.search(r"\b1(\.0)? ?Gi", run.text), run.text


def test_data_are_uploaded_and_an_error_that_would_come_again_is_final(here: RealCluster) -> None:
    """No row can be used: the first attempt finds that out, and the others only repeat it."""
    (here.directory / "useless.jsonl").write_text('{"neither": "prompt", "nor": "answer"}\n' * 50)
    values = here.overrides("final", *SMALL, "data.train=useless.jsonl", "cluster.kubernetes.retries=2")
    refused = here.dpo_ray("kubernetes", "apply", RECIPE, *values)
    assert refused.returncode == 2, refused.stderr
    assert "/mnt/shared/useless.jsonl" in refused.stderr
    uploaded = here.dpo_ray("kubernetes", "upload", RECIPE, *values)
    assert uploaded.returncode == 0, uploaded.stderr
    command = here.start("kubernetes", "apply", RECIPE, *values, "--wait")
    try:
        assert command.end(600) == 3, command.text
        assert command.text.count("prepare: started") == 1
        assert "attempt 3 of 3" in command.text or "after 3 attempts" in command.text
    finally:
        here.dpo_ray("kubernetes", "delete", "final", "--namespace", here.namespace)
