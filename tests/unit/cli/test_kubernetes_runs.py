"""The commands for runs on Kubernetes, against an API server in miniature whose pods run commands on this machine."""

import json
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")

from dpo_ray.cli.kubernetes import kubernetes
from dpo_ray.config.load import load_recipe
from dpo_ray.deploy.kubernetes.render import render
from dpo_ray.errors import ConfigError, InfrastructureError, WriteRefusedError
from tests.helpers.fakes.api_server import api_server
from tests.helpers.kubernetes import CLUSTER, RUN, pod, ray_cluster, ray_job, unscheduled
from tests.helpers.manifests import PIPELINES

RUNNING = {
    "jobDeploymentStatus": "Running",
    "jobStatus": "RUNNING",
    "rayClusterName": CLUSTER,
    "jobId": f"job-{os.getpid()}",
}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "failed": 1, "message": "exit code 75"}
DRIVER = """
import signal, sys
def stopped(*_):
    print("asked to stop, and has, after step 7 of 20", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stopped)
print("train: 6/20 steps", flush=True)
signal.pause()
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.apply.POLL_SECONDS", 0.01)
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.apply.GONE_SECONDS", 10)
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.runs.POLL_SECONDS", 0.05)
    with api_server(tmp_path / "config") as server:
        server.pod_root = tmp_path / "pod"
        (server.pod_root / "logs").mkdir(parents=True)
        yield server


def run(*arguments, code=0, text=None):
    result = CliRunner().invoke(kubernetes, list(arguments), input=text)
    if isinstance(result.exception, ConfigError | InfrastructureError | WriteRefusedError):
        raise result.exception
    assert result.exit_code == code, (result.output, result.exception)
    return result


def applied(server, **overrides):
    """Put the quickstart's objects on the server, under the name that its RayJob has."""
    recipe = load_recipe(PIPELINES / "quickstart.yaml", [f"cluster.kubernetes.{k}={v}" for k, v in overrides.items()])
    for manifest in render(recipe):
        server.objects[manifest["kind"], manifest["metadata"]["name"]] = manifest
    return server.objects["RayJob", "quickstart"]


def test_the_list_shows_state_attempt_and_why_each_waits(server):
    assert run("list").stdout == "the namespace lab has no runs\n"
    server.objects["RayJob", RUN] = ray_job(jobDeploymentStatus="Initializing", rayClusterName=CLUSTER, failed=1)
    server.objects["RayCluster", CLUSTER] = ray_cluster()
    server.objects["Pod", "h"] = unscheduled(
        "h", "headgroup", "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    )
    done = ray_job(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", endTime="2026-01-01T00:00:00Z")
    done["metadata"] |= {"name": "done", "creationTimestamp": "2026-01-01T00:00:00Z"}
    server.objects["RayJob", "done"] = done
    table = run("list").stdout
    assert "the pods start: attempt 2 of 4" in table
    assert "head: no node has room for some nvidia.com/gpu" in table
    listed = {each["name"]: each for each in json.loads(run("list", "--json").stdout)}
    assert listed["done"]["state"] == "done"
    assert listed["done"]["since"] > 0
    assert listed["done"]["waits"] == ""
    assert listed[RUN]["attempt"] == 2


@pytest.fixture
def driver(server, tmp_path):
    """Start a process that looks like the driver of the run, and keep the RayJob's state as the operator would."""
    script = tmp_path / "dpo-ray"
    script.write_text(DRIVER)
    log = server.pod_root / "logs" / f"job-driver-{RUNNING['jobId']}.log"
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": RUNNING["jobId"]}})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), "run", "recipe.yaml"], stdout=output, env=os.environ | environment
        )
    while not log.stat().st_size:
        time.sleep(0.01)
    server.objects["RayJob", RUN] = ray_job(**RUNNING)
    server.objects["Pod", "h"] = pod("h", "headgroup")

    def operator(server):
        server.steps.append(operator)
        if process.poll() is not None and ("RayJob", RUN) in server.objects:
            server.objects["RayJob", RUN]["status"] |= FAILED

    server.steps = [operator]
    yield process
    process.kill()
    process.wait()


def test_stop_ends_the_driver_with_a_checkpoint_and_frees_the_pods(server, driver):
    result = run("stop", RUN)
    assert driver.poll() == 75
    assert "asked to stop, and has, after step 7 of 20" in result.stdout
    assert "apply the recipe again to continue" in result.stderr
    assert ("RayJob", RUN) not in server.objects
    retries = [body for method, path in server.requests if method == "PATCH" for body in [path]]
    assert retries == [
        f"/apis/ray.io/v1/namespaces/lab/rayjobs/{RUN}"
    ]  # before the signal, the retries were taken away


def test_stop_without_the_right_to_reach_the_driver_changes_nothing(server, driver):
    server.forbidden = {"exec"}
    with pytest.raises(InfrastructureError, match="cannot be asked to stop: 403") as refused:
        run("stop", RUN)
    assert "--grace-seconds 0" in refused.value.fix
    assert server.objects["RayJob", RUN]["spec"]["backoffLimit"] == 3
    assert driver.poll() is None


def test_stop_signals_a_driver_only_once(server, driver):
    server.objects["RayJob", RUN]["metadata"]["annotations"] = {"dpo-ray/stop-asked": RUNNING["jobId"]}
    assert run("logs", RUN).stdout == "train: 6/20 steps\n"
    result = run("stop", RUN, "--grace-seconds", "0.1")
    assert "still running after 0.1 s" in result.stderr
    assert driver.poll() is None


def test_delete_leaves_the_claim_and_with_results_only_the_runs_directory_goes(server):
    applied(server, storage="{create_gib: 10}", namespace="lab")
    mount = server.pod_root / "runs"
    for file in ("quickstart/report.html", "quickstart/logs/attempt-1/driver.log", "artifacts/policy-1/weights"):
        (mount / file).parent.mkdir(parents=True, exist_ok=True)
        (mount / file).write_text("x")
    refused = CliRunner().invoke(kubernetes, ["delete", "quickstart", "--results"], input="n\n")
    assert refused.exit_code == 1
    assert ("RayJob", "quickstart") in server.objects
    result = run("delete", "quickstart", "--results", "--yes")
    assert {kind for kind, _ in server.objects} == {"PersistentVolumeClaim"}
    assert not (mount / "quickstart").exists()
    assert (mount / "artifacts/policy-1/weights").exists()
    assert "/mnt/shared/runs/artifacts, which stays" in result.stdout
    with pytest.raises(ConfigError, match="no run of this name"):
        run("delete", "quickstart")


def test_logs_are_the_live_ones_or_what_an_attempt_left(server):
    applied(server, namespace="lab")
    logs = server.pod_root / "runs" / "quickstart" / "logs"
    for attempt in (1, 2):
        (logs / f"attempt-{attempt}" / "n1").mkdir(parents=True)
        (logs / f"attempt-{attempt}" / "driver.log").write_text(f"attempt {attempt}\nlast line")
        (logs / f"attempt-{attempt}" / "n1" / "worker.log").write_text("a worker\n")
    assert run("logs", "quickstart").stdout == "attempt 2\nlast line\n"
    assert run("logs", "quickstart", "--attempt", "1").stdout == "attempt 1\nlast line\n"
    assert run("logs", "quickstart", "--file", "n1/worker.log").stdout == "a worker\n"
    assert "other files of it: n1/worker.log" in run("logs", "quickstart").stderr
    assert not [key for key in server.objects if key[0] == "Pod"]  # the small pods are gone
    with pytest.raises(ConfigError, match="left no logs"):
        run("logs", "quickstart", "--attempt", "7")
    with pytest.raises(ConfigError, match="no such file"):
        run("logs", "quickstart", "--file", "other.log")
    del server.objects["RayJob", "quickstart"]
    with pytest.raises(ConfigError, match="no such RayJob") as missing:
        run("logs", "quickstart")
    assert "recipe file" in missing.value.fix
    recipe = str(PIPELINES / "quickstart.yaml")
    assert run("logs", recipe, "--namespace", "lab").stdout == "attempt 2\nlast line\n"


def test_the_small_pod_is_the_runs_image_with_its_volume_and_no_rights(server):
    applied(server, namespace="lab", image="registry/x:1", image_pull_secrets="[pull]")
    created = []
    (server.pod_root / "runs/quickstart/logs/attempt-1").mkdir(parents=True)
    (server.pod_root / "runs/quickstart/logs/attempt-1/driver.log").write_text("x\n")
    original = server.answer
    server.answer = lambda method, path, body: created.append(body) or original(method, path, body)
    run("logs", "quickstart")
    made = next(body for body in created if body and body.get("kind") == "Pod")
    spec = made["spec"]
    assert spec["containers"][0]["image"] == "registry/x:1"
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert next(v.get("persistentVolumeClaim") for v in spec["volumes"]) == {"claimName": "dpo-ray"}
    assert "dpo-ray/run" not in made["metadata"]["labels"]  # it is no pod of the run


def test_download_brings_the_report_and_the_policy_compared(server, tmp_path):
    applied(server, namespace="lab")
    runs = server.pod_root / "runs"
    for file in (
        "quickstart/report.html",
        "quickstart/lease-000001.json",
        "artifacts/policy-1/policy/model.safetensors",
    ):
        (runs / file).parent.mkdir(parents=True, exist_ok=True)
        (runs / file).write_text(file)
    log = runs / "quickstart/logs/attempt-1/driver.log"
    log.parent.mkdir(parents=True)
    log.write_text("train: 20 steps\n")
    target = tmp_path / "here"
    with pytest.raises(ConfigError, match="not ended with a policy"):
        run("download", "quickstart", "--to", str(target))
    log.write_text("train: 20 steps\naccuracy=0.79 policy=/mnt/shared/runs/artifacts/policy-1/policy\n")
    (target / "policy").mkdir(parents=True)
    (target / "policy" / "model.safetensors.dpo-ray-part").write_text("artifacts/pol")
    result = run("download", "quickstart", "--to", str(target))
    assert "goes on after 13 B" in result.stderr
    files = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert files == {
        "report.html": "quickstart/report.html",
        "policy/model.safetensors": "artifacts/policy-1/policy/model.safetensors",
    }
    assert run("download", "quickstart", "--to", str(target)).stdout.count("is there already") == 2
    (target / "report.html").write_text("mine")
    with pytest.raises(WriteRefusedError, match="another file of this name"):
        run("download", "quickstart", "--to", str(target))
