"""Applying with the official client, and outages, against an API server in miniature."""

import copy
import logging

import pytest

pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")

from dpo_ray.deploy.kubernetes.apply import apply, remove
from dpo_ray.deploy.kubernetes.client import POD, RAY_JOB, Cluster, default_namespace
from dpo_ray.errors import InfrastructureError, LeaseError, LostSightError
from tests.helpers.fakes.api_server import KINDS, api_server, write_kubeconfig

MANIFESTS = [
    {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "run", "namespace": "lab"}},
    {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "dpo-ray", "namespace": "lab"}},
    {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "run", "namespace": "lab"}},
    {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "run", "namespace": "lab"}, "spec": {}},
]


def manifests():
    return copy.deepcopy(MANIFESTS)


def test_everything_is_applied_in_order_and_the_run_last(server):
    lines = list(apply(Cluster(), manifests()))
    assert [line.split(":")[0] for line in lines] == [
        "ServiceAccount/run",
        "PersistentVolumeClaim/dpo-ray",
        "NetworkPolicy/run",
        "RayJob/run",
    ]
    patched = [path for method, path in server.requests if method == "PATCH"]
    assert patched[-1] == "/apis/ray.io/v1/namespaces/lab/rayjobs/run"
    assert server.objects["RayJob", "run"] == MANIFESTS[-1]


def test_a_claim_that_is_there_is_left_alone(server):
    server.objects["PersistentVolumeClaim", "dpo-ray"] = {"kind": "PersistentVolumeClaim", "mine": True}
    list(apply(Cluster(), manifests()))
    assert server.objects["PersistentVolumeClaim", "dpo-ray"]["mine"]


def test_a_run_of_the_name_is_not_overwritten_but_by_request(server):
    server.objects["RayJob", "run"] = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {}, "old": True}
    with pytest.raises(LeaseError, match="lab/run"):
        list(apply(Cluster(), manifests()))
    assert list(server.objects) == [("RayJob", "run")]  # nothing was changed
    lines = list(apply(Cluster(), manifests(), replace=True))
    assert lines[0] == "RayJob/run: deleting it; its pods end first"
    assert "old" not in server.objects["RayJob", "run"]


def test_replacing_names_the_pods_that_are_waited_for(server, monkeypatch):
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.apply.POLL_SECONDS", 0.01)
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.apply.TOLD_EVERY_SECONDS", 0.0)
    server.objects["RayJob", "run"] = {"metadata": {"name": "run"}}
    head = {"metadata": {"name": "run-head", "labels": {"dpo-ray/run": "run"}, "deletionGracePeriodSeconds": 120}}
    server.objects["Pod", "run-head"], server.cascades = head, False
    lines = []
    for line in apply(Cluster(), manifests(), replace=True):
        lines.append(line)
        if "waiting for" in line:
            server.objects.pop(("Pod", "run-head"), None)
    assert any("waiting for run-head; Kubernetes kills what has not ended after 120 s" in line for line in lines)
    assert any(line.startswith("RayJob/run: deleted, with its pods, in ") for line in lines)


def test_a_pod_that_ends_before_its_work_began_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.apply.POLL_SECONDS", 0.01)
    server.objects["RayJob", "run"], server.cascades = {"metadata": {"name": "run"}}, False
    for name, phase in (("starts", "Pending"), ("works", "Running")):
        metadata = {"name": name, "labels": {"dpo-ray/run": "run"}}
        metadata |= {"deletionGracePeriodSeconds": 120, "deletionTimestamp": "2026-12-01T00:00:00Z"}
        server.objects["Pod", name] = {"metadata": metadata, "status": {"phase": phase}}
    removing = remove(Cluster(), RAY_JOB, "lab", "run")
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.apply.TOLD_EVERY_SECONDS", 0.0)
    assert next(removing).endswith("its pods end first")
    assert "waiting for" in next(removing)
    assert ("Pod", "starts") not in server.objects
    assert ("Pod", "works") in server.objects


def test_replacing_needs_no_right_to_see_pods(server):
    server.forbidden = {"pods"}
    server.objects["RayJob", "run"] = {"metadata": {"name": "run"}, "old": True}
    list(apply(Cluster(), manifests(), replace=True))
    assert "old" not in server.objects["RayJob", "run"]


def test_a_cluster_without_the_operator(server):
    server.kinds = {k: v for k, v in KINDS.items() if k != "ray.io/v1"}
    with pytest.raises(InfrastructureError, match="RayJob/run: the cluster does not know this kind"):
        list(apply(Cluster(), manifests()))


@pytest.mark.parametrize(
    ("code", "fix"),
    [(401, "log in"), (403, "permissions"), (404, "namespace"), (422, "correct what the message names")],
)
def test_a_refusal_is_one_line_with_the_servers_own_words(server, code, fix):
    server.refuse = (code, 'serviceaccounts "run" is forbidden')
    with pytest.raises(
        InfrastructureError, match=f'refused the request with {code}: serviceaccounts "run" is forbidden'
    ) as refused:
        list(apply(Cluster(patience_seconds=0), manifests()[:1]))
    assert fix in refused.value.fix


def test_a_server_that_never_answered_is_not_waited_for(server, tmp_path):
    with api_server(tmp_path / "config"):
        pass  # its port is closed from here on
    with pytest.raises(LostSightError, match="does not answer") as lost:
        Cluster().get(RAY_JOB, "lab", "run")
    assert lost.value.exit_code == 11
    with pytest.raises(InfrastructureError, match="no cluster is configured"):
        Cluster("elsewhere")


def test_an_outage_is_outlived_and_told_once(server, caplog):
    told = []
    cluster = Cluster(say=told.append, first_pause_seconds=0.01)
    assert cluster.get(RAY_JOB, "lab", "run") is None
    server.objects["RayJob", "run"] = {"metadata": {"name": "run"}}
    server.failures = [0, 503, 429, 0, 502]
    with caplog.at_level(logging.WARNING):
        assert cluster.get(RAY_JOB, "lab", "run") == {"metadata": {"name": "run"}}
    assert [line.split(" (")[0].split(" after")[0] for line in told] == [
        "the API server does not answer",
        "the API server answers again",
    ]
    assert "HTTP 503" in told[0]
    assert not caplog.records  # no warnings of urllib3


def test_one_lost_connection_is_not_worth_a_line(server):
    told = []
    cluster = Cluster(say=told.append, first_pause_seconds=0.01)
    cluster.get(RAY_JOB, "lab", "run")
    server.failures = [0]
    assert cluster.get(RAY_JOB, "lab", "run") is None
    assert told == []


def test_patience_ends(server):
    cluster = Cluster(patience_seconds=0.1, first_pause_seconds=0.02)
    cluster.get(RAY_JOB, "lab", "run")
    server.failures = [503] * 50
    with pytest.raises(LostSightError, match=r"does not answer since .*HTTP 503"):
        cluster.get(RAY_JOB, "lab", "run")
    assert len(server.failures) > 40  # the pauses grow


def test_a_token_that_has_expired_is_read_again(server, tmp_path):
    port = int(Cluster().client().configuration.host.rpartition(":")[2])
    write_kubeconfig(tmp_path / "config", port, "old")
    server.token = "old"
    cluster = Cluster(first_pause_seconds=0.01)
    assert cluster.get(RAY_JOB, "lab", "run") is None
    server.token = "new"
    write_kubeconfig(tmp_path / "config", port, "new")
    assert cluster.get(RAY_JOB, "lab", "run") is None
    server.token = "newer"
    with pytest.raises(InfrastructureError, match="401"):
        Cluster().get(RAY_JOB, "lab", "run")


def test_objects_are_chosen_by_labels_and_fields(server):
    for name, run in (("a", "one"), ("b", "two")):
        server.objects["Pod", name] = {"metadata": {"name": name, "labels": {"dpo-ray/run": run}}}
    assert [p["metadata"]["name"] for p in Cluster().objects(POD, "lab", labels="dpo-ray/run=two")] == ["b"]
    assert [p["metadata"]["name"] for p in Cluster().objects(POD, "lab", fields="metadata.name=a")] == ["a"]
    assert default_namespace() == "lab"
