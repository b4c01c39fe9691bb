"""Applying and following with the official client, against an API server in miniature."""

import copy

import pytest

pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")

from dpo_ray.deploy.kubernetes import client
from dpo_ray.errors import ConfigError, InfrastructureError, LeaseError
from tests.helpers.fakes.api_server import KINDS, api_server

MANIFESTS = [
    {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "run", "namespace": "lab"}},
    {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "dpo-ray", "namespace": "lab"}},
    {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "run", "namespace": "lab"}},
    {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "run", "namespace": "lab"}, "spec": {}},
]


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the client keeps there what a server knows, by its port
    with api_server(tmp_path / "config") as server:
        yield server


def manifests():
    return copy.deepcopy(MANIFESTS)


def test_everything_is_applied_in_order_and_the_run_last(server):
    lines = list(client.apply(client.connect(), manifests()))
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
    list(client.apply(client.connect(), manifests()))
    assert server.objects["PersistentVolumeClaim", "dpo-ray"]["mine"]


def test_a_run_of_the_name_is_not_overwritten_but_by_request(server):
    server.objects["RayJob", "run"] = {"apiVersion": "ray.io/v1", "kind": "RayJob", "old": True}
    with pytest.raises(LeaseError, match="lab/run"):
        list(client.apply(client.connect(), manifests()))
    assert list(server.objects) == [("RayJob", "run")]  # nothing was changed
    list(client.apply(client.connect(), manifests(), replace=True))
    assert "old" not in server.objects["RayJob", "run"]


def test_a_run_is_followed_through_its_states_to_the_drivers_exit_code(server):
    server.objects["RayJob", "run"] = manifests()[-1]
    failed = "Job entrypoint command failed with exit code 7, last available logs:\n..."
    server.states = [
        {},
        {"jobDeploymentStatus": "Initializing"},
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 1},
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "failed": 2, "message": failed},
    ]
    seen = list(client.watch(client.connect(), "lab", "run", poll_seconds=0.01))
    assert [s.deployment for s in seen] == ["", "Initializing", "Running", "Retrying", "Failed"]
    assert seen[-1].exit_code == 7
    assert str(seen[-1]) == (
        "Failed, FAILED, 2 failed attempts: Job entrypoint command failed with exit code 7, last available logs:"
    )


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 9),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, 9),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "spec is invalid"}, 9),
    ],
)
def test_ends_have_exit_codes(status, code):
    state = client.state_of({"status": status})
    assert state.finished
    assert state.exit_code == code


def test_no_such_run(server):
    with pytest.raises(ConfigError, match="no such RayJob"):
        list(client.watch(client.connect(), "lab", "run"))


def test_a_cluster_without_the_operator(server):
    server.kinds = {k: v for k, v in KINDS.items() if k != "ray.io/v1"}
    with pytest.raises(InfrastructureError, match="RayJob/run: the cluster does not know this kind"):
        list(client.apply(client.connect(), manifests()))


@pytest.mark.parametrize(
    ("code", "fix"),
    [(401, "log in"), (403, "permissions"), (404, "namespace"), (422, "correct what the message names")],
)
def test_a_refusal_is_one_line_with_the_servers_own_words(server, code, fix):
    server.refuse = (code, 'serviceaccounts "run" is forbidden')
    with pytest.raises(
        InfrastructureError, match=f'refused the request with {code}: serviceaccounts "run" is forbidden'
    ) as refused:
        list(client.apply(client.connect(), manifests()))
    assert fix in refused.value.fix


def test_no_answer_and_no_configuration(server, tmp_path, monkeypatch):
    with api_server(tmp_path / "config"):
        pass  # its port is closed from here on
    with pytest.raises(InfrastructureError, match="does not answer"):
        client.connect()
    with pytest.raises(InfrastructureError, match="no cluster is configured"):
        client.connect("elsewhere")
