"""Why a run waits: each cause that was seen on a cluster, in the words that Kubernetes, KubeRay and Kueue use."""

import pytest

from dpo_ray.deploy.kubernetes.causes import Surroundings, causes
from tests.helpers.kubernetes import claim, event, pod, ray_cluster, ray_job, unscheduled, waiting_container, workload

NO_GPU = (
    "0/3 nodes are available: 1 Insufficient cpu, 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available"
)
QUOTA = (
    'pods "run-x-head-abc" is forbidden: exceeded quota: lab, requested: limits.cpu=2,requests.cpu=2, '
    "used: limits.cpu=7, limited: limits.cpu=8"
)
HOOK = 'admission webhook "policy.example.org" denied the request: image must come from registry.example.org'


def told(**surroundings):
    surroundings.setdefault("run", ray_job(jobDeploymentStatus="Initializing"))
    surroundings = {k: tuple(v) if isinstance(v, list) else v for k, v in surroundings.items()}
    return causes(Surroundings(**surroundings))


def only(**surroundings):
    found = told(**surroundings)
    assert len(found) == 1, found
    assert found[0].fix
    return found[0]


def test_no_node_with_a_gpu_is_one_cause_for_all_pods():
    pods = [unscheduled(f"t-{n}", "training", NO_GPU, requests={"nvidia.com/gpu": "8", "cpu": "4"}) for n in range(8)]
    cause = only(pods=pods)
    assert cause.whom == "training (8 pods)"
    assert cause.what.startswith("no node has room for 4 cpu, 8 nvidia.com/gpu: 0/3 nodes are available")
    assert "preemption" not in cause.what
    assert "cluster.kubernetes.training" in cause.fix


def test_a_claim_without_a_volume_is_named_with_the_provisioners_words():
    message = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"
    head = unscheduled("h", "headgroup", message, claims=["other", "dpo-ray"])
    words = "no persistent volumes available for this claim and no storage class is set"
    told_of_it = event("PersistentVolumeClaim", "dpo-ray", "FailedBinding", words, kind="Normal")
    cause = only(pods=[head], claims=[claim("other", "Bound"), claim("dpo-ray", "Pending")], events=[told_of_it])
    assert cause.whom == "head"
    assert cause.what == f"the PersistentVolumeClaim dpo-ray has no volume (unbound): {words}"


def test_a_claim_that_does_not_exist():
    cause = only(pods=[unscheduled("h", "headgroup", 'persistentvolumeclaim "dpo-ray" not found')])
    assert cause.what == "the PersistentVolumeClaim dpo-ray does not exist"


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff"])
def test_a_wrong_image_is_one_cause_while_kubernetes_tries_again(reason):
    messages = {"ErrImagePull": "rpc error: failed to pull: not found", "ImagePullBackOff": "Back-off: not found"}
    cause = only(pods=[waiting_container("h", "headgroup", reason, messages[reason], image="dpo-ray:0")])
    assert cause.what == "the image dpo-ray:0 cannot be pulled (not found)"


def test_a_missing_secret():
    cause = only(pods=[waiting_container("h", "headgroup", "CreateContainerConfigError", 'secret "hf" not found')])
    assert cause.what == 'secret "hf" not found'
    assert "secrets" in cause.fix


def test_a_quota_and_a_webhook_speak_through_the_ray_cluster():
    cause = only(cluster=ray_cluster(conditions=[("ReplicaFailure", "True", "FailedCreateHeadPod", QUOTA)]))
    assert cause.whom == "head"
    assert cause.what.startswith(
        "the quota `lab` is exceeded: requested limits.cpu=2,requests.cpu=2, used limits.cpu=7"
    )
    refused = event("RayCluster", "run-x", "FailedToCreateWorkerPod", f"Failed to create worker Pod: {HOOK}")
    cause = only(cluster=ray_cluster(), events=[refused])
    assert cause.whom == "workers"
    assert cause.what.startswith("the admission webhook policy.example.org refuses it: image must come from")
    cause = only(events=[event("RayJob", "run", "FailedToCreateRayCluster", HOOK)])
    assert cause.whom == "RayJob"
    assert "policy.example.org" in cause.what


def test_a_volume_that_is_not_mounted_and_an_image_that_is_being_pulled():
    slow = pod("t", "training", phase="Pending")
    mount = event("Pod", "t", "FailedMount", "MountVolume.SetUp failed: timed out", at=2)
    pulling = event("Pod", "t", "Pulling", 'Pulling image "dpo-ray:1"', kind="Normal", at=1)
    assert only(pods=[slow], events=[mount, pulling]).what.startswith("FailedMount: MountVolume.SetUp failed")
    assert only(pods=[slow], events=[pulling]).what == 'Pulling image "dpo-ray:1"'
    pulled = event("Pod", "t", "Pulled", "Successfully pulled", kind="Normal", at=3)
    assert told(pods=[slow], events=[pulling, pulled]) == []


def test_a_queue_tells_why_it_does_not_admit():
    run = ray_job(jobDeploymentStatus="Suspended", suspend=True, queue="team")
    flavors = (
        "couldn't assign flavors to pod set head: insufficient unused quota for cpu in flavor default, 2 more needed"
    )
    waits = workload(("QuotaReserved", "False", "Pending", flavors))
    assert only(run=run, workloads=[waits]).what == flavors
    preempted = workload(
        ("QuotaReserved", "False", "Pending", flavors), ("Evicted", "True", "Preempted", "Preempted for an urgent one")
    )
    assert [c.what for c in told(run=run, workloads=[preempted])] == [
        "Kueue took its place away: Preempted for an urgent one",
        flavors,
    ]
    assert "no Workload" in only(run=run).what
    assert only(run=run, workloads=None).what == "it waits in the queue team"


def test_a_run_that_nobody_takes_up_or_that_was_suspended():
    assert "operator" in only(run=ray_job()).what
    cause = only(run=ray_job(jobDeploymentStatus="Suspended", suspend=True))
    assert cause.what == "it is suspended (spec.suspend)"
    assert "kubectl patch rayjob run" in cause.fix


def test_pods_that_run_are_no_cause():
    assert told(cluster=ray_cluster(), pods=[pod("h", "headgroup"), pod("t", "training")]) == []
