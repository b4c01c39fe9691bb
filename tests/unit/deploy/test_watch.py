"""Following a run through an API server in miniature: what is told, in which order, and how it ends."""

import pytest

from dpo_ray.deploy.kubernetes.client import Cluster
from dpo_ray.deploy.kubernetes.driver_log import Position, read
from dpo_ray.deploy.kubernetes.watch import watch
from dpo_ray.errors import ConfigError, InfrastructureError, LostSightError, StoppedError
from tests.helpers.kubernetes import (
    CLUSTER,
    RUN,
    event,
    pod,
    ray_cluster,
    ray_job,
    unscheduled,
    waiting_container,
    workload,
)

RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": CLUSTER, "jobId": "run-1"}
FAILED = "Job entrypoint command failed with exit code 7, last available logs (truncated to 20,000 chars):\nerror: loss\n  -> lower it\n"


@pytest.fixture
def lab(server, tmp_path):
    """Play a run's states: one step at each question about its RayJob; the pods' directories are below tmp_path."""
    server.pod_root = tmp_path / "pod"
    (server.pod_root / "logs").mkdir(parents=True)
    server.objects["RayJob", RUN] = ray_job()
    return server


def state(retries=3, **status):
    """Return a step that sets the state of the RayJob."""

    def step(server):
        server.objects["RayJob", RUN] = ray_job(retries=retries, **status)

    return step


def pods(*present, cluster=None):
    """Return a step that sets which pods there are."""

    def step(server):
        for key in [k for k in server.objects if k[0] == "Pod"]:
            del server.objects[key]
        server.objects |= {("Pod", p["metadata"]["name"]): p for p in present}
        server.objects["RayCluster", CLUSTER] = cluster or ray_cluster()

    return step


def writes(text, job="run-1"):
    """Return a step in which the driver writes."""

    def step(server):
        with (server.pod_root / "logs" / f"job-driver-{job}.log").open("ab") as log:
            log.write(text.encode())

    return step


def together(*steps):
    return lambda server: [step(server) for step in steps]


def nothing(server):
    pass


def followed(server, *steps, **options):
    server.steps = list(steps)
    told, written = [], []
    cluster = Cluster(first_pause_seconds=0.01, say=told.append, patience_seconds=options.pop("patience", 5))
    options = {"poll_seconds": 0.01, "from_start": True} | options
    try:
        end = watch(cluster, "lab", RUN, told.append, written.append, **options)
    except (ConfigError, InfrastructureError, StoppedError, LostSightError) as error:
        end = error
    return end, told, written


def test_a_run_is_followed_from_its_first_pod_to_its_last_line(lab):
    end, told, written = followed(
        lab,
        nothing,
        together(state(jobDeploymentStatus="Initializing", rayClusterName=CLUSTER), pods()),
        pods(pod("h", "headgroup"), pod("t", "training"), cluster=ray_cluster(workers={"training": 1})),
        together(state(**RUNNING), writes("prepare: started\nprepare: 12 ro")),
        writes("ws\n\x1b[1mtrain\x1b[0m: 1/2 steps\n"),
        together(
            state(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", rayClusterName=CLUSTER, jobId="run-1"),
            writes("policy=x\n"),
        ),
    )
    assert end.exit_code == 0
    assert written == ["prepare: started", "prepare: 12 rows", "train: 1/2 steps", "policy=x"]
    assert told == [
        "waiting for the KubeRay operator",
        "the pods start: attempt 1 of 4",
        "pods that run: head 0/1",
        "pods that run: head 1/1, training 1/1",
        "runs: attempt 1 of 4",
        "done",
    ]


def test_somebody_who_joins_later_sees_the_last_whole_lines(lab):
    old = "".join(f"step {n}\n" for n in range(1000))
    end, _, written = followed(
        lab,
        together(state(**RUNNING), pods(pod("h", "headgroup")), writes(old)),
        together(
            state(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", rayClusterName=CLUSTER, jobId="run-1"),
            writes("end\n"),
        ),
        from_start=False,
    )
    assert end.exit_code == 0
    assert written[-2:] == ["step 999", "end"]
    assert 150 < len(written) < 300
    assert all(line.startswith("step ") for line in written[:-1])


def test_why_it_waits_is_told_once_it_lasts_and_again_when_it_changes(lab):
    starting = state(jobDeploymentStatus="Initializing", rayClusterName=CLUSTER)
    no_room = unscheduled("h", "headgroup", "0/1 nodes are available: 1 Insufficient cpu.", requests={"cpu": "2"})
    wrong = waiting_container("h", "headgroup", "ErrImagePull", "not found", image="dpo-ray:0")
    _, told, _ = followed(
        lab,
        together(starting, pods(no_room)),
        nothing,
        nothing,
        pods(wrong),
        nothing,
        pods(pod("h", "headgroup")),
        state(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"),
    )
    waits = [line for line in told if line.startswith("waits")]
    assert [line.splitlines()[0] for line in waits] == [
        "waits: head: no node has room for 2 cpu: 0/1 nodes are available: 1 Insufficient cpu.",
        "waits: head: the image dpo-ray:0 cannot be pulled (not found)",
    ]
    assert all("\n  -> " in line for line in waits)


def test_a_queue_and_a_volume_are_asked_about(lab):
    lab.objects["Workload", "w"] = workload(("QuotaReserved", "False", "Pending", "no quota"))
    queued = ray_job(jobDeploymentStatus="Suspended", suspend=True, queue="team")
    unbound = unscheduled("h", "headgroup", "pod has unbound immediate PersistentVolumeClaims", claims=["dpo-ray"])
    lab.objects["Event", "e"] = event("PersistentVolumeClaim", "dpo-ray", "FailedBinding", "no class", kind="Normal")
    _, told, _ = followed(
        lab,
        lambda server: server.objects.update({("RayJob", RUN): queued}),
        nothing,
        together(state(jobDeploymentStatus="Initializing", rayClusterName=CLUSTER), pods(unbound)),
        nothing,
        state(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"),
    )
    waits = [line.splitlines()[0] for line in told if line.startswith("waits")]
    assert waits == [
        "waits: queue: no quota",
        "waits: head: the PersistentVolumeClaim dpo-ray has no volume (unbound): no class",
    ]


def test_a_failed_attempt_its_pods_and_the_next_one(lab):
    lost = {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 1, "message": FAILED}
    end, told, written = followed(
        lab,
        together(state(**RUNNING), pods(pod("h", "headgroup"))),
        together(state(**lost), pods()),
        together(
            state(**(RUNNING | {"failed": 1, "jobId": "run-2"})), pods(pod("h-2", "headgroup")), writes("on\n", "run-2")
        ),
        state(jobDeploymentStatus="Failed", jobStatus="FAILED", failed=2, message=FAILED),
    )
    assert end.exit_code == 7
    assert written == ["on"]
    assert told == [
        "runs: attempt 1 of 4",
        "pods that run: head 1/1",
        "attempt 1 of 4 failed; the operator starts the next one on a new Ray cluster",
        "  exit code 7: Training stopped because a loss or a gradient was not finite, or because the workers failed too often",
        "  error: loss",
        "    -> lower it",
        "runs: attempt 2 of 4",
        "pods that run: head 1/1",
        "failed, after 2 attempts",
    ]


def test_a_head_that_comes_back_and_one_that_does_not(lab):
    away = ray_cluster(conditions=[("HeadPodReady", "False", "", "", "2026-11-29T10:00:00Z")])
    no_room = unscheduled("h-2", "headgroup", "0/1 nodes are available: 1 Insufficient cpu.")
    end, told, written = followed(
        lab,
        together(state(**RUNNING), pods(pod("h", "headgroup")), writes("first\n")),
        pods(cluster=away),
        together(pods(pod("h-2", "headgroup")), writes("again\n")),
        pods(no_room, cluster=away),
        head_lost_seconds=0.1,
    )
    assert isinstance(end, InfrastructureError)
    assert end.exit_code == 9
    assert "the head has been gone for" in end.what
    assert "head: no node has room" in end.what
    assert "--replace" in end.fix
    assert written == ["first", "first", "again"]  # a new head runs a driver with a log of its own
    gone = "the head, and the driver with it, is gone since 2026-11-29T10:00:00Z; waiting for it for up to 0.1 s"
    assert told.count(gone) == 2
    assert any(line.startswith("the head is back after") for line in told)


def test_no_such_run_and_one_that_is_deleted_meanwhile(lab):
    end, _, _ = followed(lab, state(**RUNNING), lambda server: server.objects.pop(("RayJob", RUN)))
    assert isinstance(end, StoppedError)
    assert end.exit_code == 75
    end, _, _ = followed(lab)
    assert isinstance(end, ConfigError)
    assert "no such RayJob" in end.what


def test_an_outage_is_not_the_end_of_a_run(lab):
    def outage(server):
        server.failures = [503] * 4

    done = state(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    end, told, _ = followed(lab, together(state(**RUNNING), pods(pod("h", "headgroup")), outage), nothing, done)
    assert end.exit_code == 0
    assert any("answers again" in line for line in told)
    end, _, _ = followed(lab, state(**RUNNING), lambda server: setattr(server, "failures", [503] * 99), patience=0.05)
    assert isinstance(end, LostSightError)
    assert end.exit_code == 11


def test_who_may_only_read_rayjobs_still_sees_the_states(lab):
    lab.forbidden = {"pods", "events", "persistentvolumeclaims", "exec"}
    done = state(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    steps = [together(state(**RUNNING), pods(pod("h", "headgroup"))), nothing, nothing, done]
    end, told, _ = followed(lab, *steps, head_lost_seconds=0)
    assert end.exit_code == 0
    assert told == [
        "the pods cannot be read, only the run's state; it needs the right to `list` pods",
        "runs: attempt 1 of 4",
        "done",
    ]
    lab.forbidden = {"exec"}
    _, told, _ = followed(lab, together(state(**RUNNING), pods(pod("h", "headgroup"))), nothing, done)
    assert [line for line in told if "pods/exec" in line] == [
        "the driver's log cannot be read (403: pods/exec is forbidden); it needs the right to `create` and `get` pods/exec"
    ]


def test_a_log_is_read_in_pieces_and_every_byte_once(lab, monkeypatch):
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.driver_log.PIECE_BYTES", 64)
    head = pod("h", "headgroup")
    pods(head)(lab)
    lines = [f"zeile {n} ü" * (n % 3 + 1) for n in range(40)]
    writes("\n".join(lines) + "\nhalf a li")(lab)
    cluster = Cluster()
    piece = read(cluster, "lab", head, "run-1", Position())
    assert piece.lines == lines
    writes("ne\n")(lab)
    assert read(cluster, "lab", head, "run-1", piece.position).lines == ["half a line"]
    writes("x" * 200 + "\n")(lab)
    assert "".join(read(cluster, "lab", head, "run-1", piece.position).lines) == "half a line" + "x" * 200
    assert read(cluster, "lab", head, "other", Position()).lines == []
