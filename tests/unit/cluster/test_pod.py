"""What a process knows of its pod, its memory limit, and of processes that were killed for memory."""

from __future__ import annotations

from dpo_ray.cluster.pod import pod_group, pod_name


def test_a_pod_is_known_by_its_namespace_and_name() -> None:
    assert pod_name({"RAY_CLOUD_INSTANCE_ID": "aligned-head", "RAY_CLUSTER_NAMESPACE": "lab"}) == "lab/aligned-head"
    assert pod_name({}) == ""


def test_its_group_is_that_of_the_profile() -> None:
    pod = {"RAY_CLOUD_INSTANCE_ID": "x"}
    assert pod_group(pod | {"RAY_NODE_TYPE_NAME": "training"}) == "training"
    assert pod_group(pod | {"RAY_NODE_TYPE_NAME": "headgroup"}) == "head"
    assert pod_group({"RAY_NODE_TYPE_NAME": "head"}) == ""
