"""Pods that are lost, with the reason, and regained."""

import pytest

from dpo_ray.deploy.kubernetes.pod_changes import PodsSeen, changes, loss
from tests.helpers.kubernetes import CLUSTER, ended, event, pod, ray_cluster

HEAD, FIRST, SECOND = pod("h", "headgroup"), pod("t-1", "training"), pod("t-2", "training", node="n2")


def seen_all():
    seen = PodsSeen()
    list(changes(seen, [HEAD, FIRST, SECOND], [], ray_cluster(workers={"training": 2})))
    return seen


def test_a_lost_pod_is_named_with_its_reason_and_then_what_takes_its_place():
    seen = seen_all()
    cluster = ray_cluster(workers={"training": 2})
    lines = list(changes(seen, [HEAD, FIRST, ended("t-2", "training", 137, "OOMKilled")], [], cluster))
    assert lines == [
        "training: lost pod t-2 on node n2: OOMKilled: its memory reached the limit of 8Gi; "
        "raise cluster.kubernetes.training.memory_gib",
        "pods that run: head 1/1, training 1/2",
    ]
    assert list(changes(seen, [HEAD, FIRST, pod("t-3", "training", phase="Pending")], [], cluster)) == []
    lines = list(changes(seen, [HEAD, FIRST, pod("t-3", "training", node="n3")], [], cluster))
    assert lines == ["training: regained, as pod t-3 on node n3", "pods that run: head 1/1, training 2/2"]


def test_a_pod_that_was_idle_leaves_and_is_not_lost():
    seen, cluster = PodsSeen(), ray_cluster(workers={"engines": 1})
    list(changes(seen, [HEAD, pod("e", "engines")], [], cluster))
    given_back = event("RayCluster", CLUSTER, "DeletedWorkerPod", "Deleted pod lab/e", kind="Normal")
    lines = list(changes(seen, [HEAD], [given_back], ray_cluster(workers={"engines": 0})))
    assert lines == ["engines: pod e was idle and leaves", "pods that run: head 1/1"]
    lines = list(changes(seen, [HEAD, pod("e-2", "engines")], [], cluster))
    assert lines == ["pods that run: head 1/1, engines 1/1"]  # it comes back without having been lost


def disrupted(reason):
    made = pod("t", "training", deletionTimestamp="now")
    made["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": reason})
    return made


def evicted():
    made = pod("t", "training", phase="Failed")
    made["status"] |= {"reason": "Evicted", "message": "The node was low on resource: memory."}
    made["status"]["containerStatuses"] = []
    return made


def unready():
    made = pod("t", "training")
    made["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    return made


KILLED = (
    "Deleted worker Pod lab/t; Pod status: Failed; Pod restart policy: Never; Ray container terminated status: "
    "&ContainerStateTerminated{ExitCode:137,Signal:0,Reason:OOMKilled,Message:,StartedAt:x,FinishedAt:y,}"
)


@pytest.mark.parametrize(
    ("last", "events", "reason"),
    [
        (ended("t", "training", 137, "Error"), [], "killed"),
        (ended("t", "training", 1, "Error"), [], "its container ended with exit code 1"),
        (disrupted("DeletionByTaintManager"), [], "its node does not answer or was drained (taint)"),
        (disrupted("PreemptionByScheduler"), [], "preempted for a pod of higher priority"),
        (evicted(), [], "Evicted: The node was low on resource: memory."),
        (unready(), [], "not ready: its node or its Ray process does not answer"),
        (pod("t", "training"), [], "deleted"),
        (pod("t", "training"), [event("Pod", "t", "Preempted", "by pod urgent")], "Preempted: by pod urgent"),
        (
            pod("t", "training"),
            [event("RayCluster", CLUSTER, "DeletedWorkerPod", KILLED)],
            "OOMKilled: its memory reached",
        ),
        (pod("t", "training"), [event("RayCluster", CLUSTER, "DeletedWorkerPod", "Deleted pod lab/t-2")], "deleted"),
    ],
)
def test_reasons(last, events, reason):
    assert loss(last, events).startswith(reason)
