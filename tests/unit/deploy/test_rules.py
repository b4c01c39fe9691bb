"""Manifests that KubeRay would refuse are refused here, with the field named; sound ones are not."""

import json
from importlib import resources
from typing import Any

import pytest

from dpo_ray.deploy.kubernetes.rules import violations
from tests.helpers.manifests import changed, sound_ray_cluster, sound_ray_job

CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
TRAIN = f"{CLUSTER}.workerGroupSpecs[1]"
SUBMITTER = {"spec": {"containers": [{"name": "submitter", "image": "ray"}]}}
V2 = [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]

# what is changed in a sound RayJob -> the field that is wrong then. Fields and limits: KubeRay 1.7, validation.go and CRDs.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt field": ({"spec.backofLimit": 2}, "spec.backofLimit"),
    "a misspelt field of a container": (
        {f"{HEAD}.template.spec.containers[0].imagePullPolcy": "Always"},
        f"{HEAD}.template.spec.containers[0].imagePullPolcy",
    ),
    "a misspelt section": ({"specs": {}}, "specs"),
    "an unknown field of metadata": ({"metadata.label": {}}, "metadata.label"),
    "text for a number": ({"spec.backoffLimit": "2"}, "spec.backoffLimit"),
    "a number for text": ({f"{CLUSTER}.rayVersion": 2.6}, f"{CLUSTER}.rayVersion"),
    "more than an int32 holds": ({"spec.backoffLimit": 2**31}, "spec.backoffLimit"),
    "no group name": ({f"{TRAIN}.groupName": None}, f"{TRAIN}.groupName"),
    "no template": ({f"{HEAD}.template": None}, f"{HEAD}.template"),
    "a name too long": ({"metadata.name": "a" * 48}, "metadata.name"),
    "a name with a digit first": ({"metadata.name": "7b"}, "metadata.name"),
    "a name in capitals": ({"metadata.name": "DPO"}, "metadata.name"),
    "no name": ({"metadata.name": None}, "metadata.name"),
    "an unknown mode": ({"spec.submissionMode": "HttpMode"}, "spec.submissionMode"),
    "no cluster": ({CLUSTER: None}, CLUSTER),
    "nothing to run": ({"spec.entrypoint": None}, "spec.entrypoint"),
    "suspended, and never shut down": (
        {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0},
        "spec.suspend",
    ),
    "a time to live without an end": ({"spec.shutdownAfterJobFinishes": None}, "spec.ttlSecondsAfterFinished"),
    "a negative time to live": ({"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
    "retries in interactive mode": ({"spec.submissionMode": "InteractiveMode"}, "spec.backoffLimit"),
    "retries on a chosen cluster": ({"spec.clusterSelector": {"ray.io/cluster": "mine"}}, "spec.backoffLimit"),
    "negative retries": ({"spec.backoffLimit": -1}, "spec.backoffLimit"),
    "no time to run": ({"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds"),
    "no time to start": ({"spec.preRunningDeadlineSeconds": 0}, "spec.preRunningDeadlineSeconds"),
    "a selector without the cluster": (
        {"spec.clusterSelector": {"cluster": "mine"}, "spec.backoffLimit": 0},
        "spec.clusterSelector",
    ),
    "a submitter's pod in sidecar mode": (
        {"spec.submissionMode": "SidecarMode", "spec.submitterPodTemplate": SUBMITTER},
        "spec.submitterPodTemplate",
    ),
    "an environment that is no YAML": ({"spec.runtimeEnvYAML": "a: [b"}, "spec.runtimeEnvYAML"),
    "deletion rules beside a shutdown": (
        {
            "spec.deletionStrategy": {
                "deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]
            },
            "spec.ttlSecondsAfterFinished": 0,
        },
        "spec.deletionStrategy.deletionRules",
    ),
    "a deletion rule of two conditions": (
        {
            "spec.deletionStrategy": {
                "deletionRules": [
                    {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}
                ]
            },
            "spec.shutdownAfterJobFinishes": False,
            "spec.ttlSecondsAfterFinished": 0,
        },
        "spec.deletionStrategy.deletionRules[0].condition",
    ),
    "pods that restart, with the autoscaler": (
        {f"{TRAIN}.template.spec.restartPolicy": "Always"},
        f"{TRAIN}.template.spec.restartPolicy",
    ),
    "the autoscaler's version said twice": (
        {f"{HEAD}.template.spec.containers[0].env": V2},
        f"{CLUSTER}.autoscalerOptions.version",
    ),
    "more pods at least than at most": ({f"{TRAIN}.minReplicas": 3}, f"{TRAIN}.minReplicas"),
    "negative pods": ({f"{TRAIN}.minReplicas": -1}, f"{TRAIN}.minReplicas"),
    "two groups of one name": ({f"{TRAIN}.groupName": "data"}, f"{TRAIN}.groupName"),
    "sizes said twice": ({f"{HEAD}.resources": {"CPU": "4"}}, f"{HEAD}.resources"),
    "labels among the parameters": (
        {f"{TRAIN}.rayStartParams": {"labels": "a=b"}},
        f"{TRAIN}.rayStartParams.labels",
    ),
    "a label with a space": ({f"{TRAIN}.labels": {"dpo/role": "two words"}}, f"{TRAIN}.labels.dpo/role"),
    "a pod without containers": (
        {f"{TRAIN}.template.spec.containers": []},
        f"{TRAIN}.template.spec.containers",
    ),
    "a token with an old Ray": (
        {f"{CLUSTER}.authOptions": {"mode": "token"}, f"{CLUSTER}.rayVersion": "2.51.0"},
        f"{CLUSTER}.rayVersion",
    ),
    "a token of Kubernetes for a job": (
        {f"{CLUSTER}.authOptions": {"mode": "token", "enableK8sTokenAuth": True}},
        f"{CLUSTER}.authOptions.enableK8sTokenAuth",
    ),
    "a gated feature": ({f"{CLUSTER}.tlsOptions": {"enabled": True}}, f"{CLUSTER}.tlsOptions"),
    "Redis behind the operator's back": (
        {f"{HEAD}.template.spec.containers[0].env": [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]},
        f"{CLUSTER}.gcsFaultToleranceOptions",
    ),
    "fault tolerance said twice": (
        {
            f"{CLUSTER}.gcsFaultToleranceOptions": {"redisAddress": "redis:6379"},
            "metadata.annotations": {"ray.io/ft-enabled": "true"},
        },
        "metadata.annotations.ray.io/ft-enabled",
    ),
    "a queue of Kueue with the autoscaler": (
        {"metadata.labels": {"kueue.x-k8s.io/queue-name": "research"}},
        f"{CLUSTER}.enableInTreeAutoscaling",
    ),
    "another kind": ({"kind": "Deployment"}, "kind"),
}


def queued(annotations):
    """Return the changes that put a sound RayJob into a queue of Kueue."""
    return {"metadata.labels": {"kueue.x-k8s.io/queue-name": "research"}, "metadata.annotations": annotations}


ELASTIC = {"kueue.x-k8s.io/elastic-job": "true"}


@pytest.mark.parametrize("manifest", [sound_ray_job(), sound_ray_cluster()], ids=["RayJob", "RayCluster"])
def test_sound_manifests_pass(manifest):
    assert violations(manifest) == []


@pytest.mark.parametrize(("changes", "field"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_manifests_are_refused_with_the_field_named(changes, field):
    manifest = sound_ray_job()
    for path, value in changes.items():
        changed(manifest, path, value)
    assert field in [finding.field for finding in violations(manifest)]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, None),
        ({"metadata.annotations": {"kueue.x-k8s.io/elastic-job": "yes"}}, f"{CLUSTER}.enableInTreeAutoscaling"),
        ({"spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0}, "spec.shutdownAfterJobFinishes"),
        ({f"{TRAIN}.groupName": "head"}, f"{TRAIN}.groupName"),
        (
            {f"{TRAIN}.template.metadata": {"annotations": {"kueue.x-k8s.io/podset-required-topology": "block"}}},
            f"{TRAIN}.template.metadata.annotations.kueue.x-k8s.io/podset-required-topology",
        ),
    ],
)
def test_what_kueue_requires_of_a_job_whose_pods_change_in_number(changes, field):
    manifest = sound_ray_job()
    for path, value in (queued(ELASTIC) | changes).items():
        changed(manifest, path, value)
    assert [finding.field for finding in violations(manifest)] == ([] if field is None else [field])


def test_kueue_admits_seven_groups_of_workers():
    cluster = sound_ray_cluster()
    cluster["metadata"] |= {"labels": {"kueue.x-k8s.io/queue-name": "research"}, "annotations": ELASTIC}
    group = cluster["spec"]["workerGroupSpecs"][0]
    cluster["spec"]["workerGroupSpecs"] = [group | {"groupName": f"data-{number}"} for number in range(7)]
    assert violations(cluster) == []
    cluster["spec"]["workerGroupSpecs"].append(group | {"groupName": "data-7"})
    assert [finding.field for finding in violations(cluster)] == ["spec.workerGroupSpecs"]


def test_deletion_rules_keep_their_order():
    manifest = sound_ray_job()
    rules = [
        {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 600}},
        {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}},
    ]
    manifest["spec"] |= {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0}
    manifest["spec"]["deletionStrategy"] = {"deletionRules": rules}
    assert [f.field for f in violations(manifest)] == ["spec.deletionStrategy.deletionRules"]
    rules[1]["condition"]["ttlSeconds"] = 900
    assert violations(manifest) == []


def test_the_limits_are_kuberays():
    manifest = sound_ray_job()
    manifest["metadata"]["name"] = "a" * 47
    assert violations(manifest) == []
    cluster = sound_ray_cluster()
    cluster["metadata"]["name"] = "a" * 53
    assert violations(cluster) == []
    cluster["metadata"]["name"] = "a" * 54
    assert [f.field for f in violations(cluster)] == ["metadata.name"]


def test_a_field_with_a_default_may_be_left_out_and_quantities_may_be_numbers():
    manifest = sound_ray_job()
    changed(manifest, f"{TRAIN}.minReplicas", None)
    changed(manifest, f"{TRAIN}.maxReplicas", None)
    changed(manifest, f"{TRAIN}.template.spec.containers[0].resources.limits", {"cpu": 64, "memory": "512Gi"})
    assert violations(manifest) == []


def test_a_name_may_be_left_to_the_api_server():
    manifest = sound_ray_job()
    manifest["metadata"] = {"generateName": "sound-"}
    assert violations(manifest) == []


@pytest.mark.parametrize("name", ["rayjobs", "rayclusters"])
def test_the_schemas_say_where_they_are_from(name):
    text = resources.files("dpo_ray.deploy.kubernetes").joinpath("crds", f"{name}.json").read_text(encoding="utf-8")
    comment = json.loads(text)["$comment"]
    assert "KubeRay 1.7.0" in comment
    assert "Apache License 2.0" in comment
