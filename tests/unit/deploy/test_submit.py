"""Submitting without a cluster: what is asked of whom, what is refused, and one clear line for everything that may fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from dpo_ray.config.load import load_recipe
from dpo_ray.deploy.ray_jobs import same_versions, stop_driver
from dpo_ray.deploy.ray_jobs.environment import runtime_environment
from dpo_ray.deploy.ray_jobs.jobs import Job, every, look
from dpo_ray.deploy.ray_jobs.server import connect, dashboard_url
from dpo_ray.deploy.ray_jobs.submit import next_attempt, submit
from dpo_ray.errors import ConfigError, DpoRayError, InfrastructureError, LeaseError
from tests.helpers.fakes.http_server import Served, served

PIPELINES = Path(__file__).resolve().parents[3] / "pipelines"
VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "c", "session_name": "s"}
LAST_WORDS = (
    "...\nerror: train: training was asked to stop, and stopped after step 7 of 90\n  -> the same command goes on"
)
RUNS = {
    "type": "SUBMISSION",
    "submission_id": "quickstart-3",
    "status": "RUNNING",
    "entrypoint": "python",
    "metadata": {"dpo_ray.recipe": "quickstart", "dpo_ray.output": "/shared/runs", "dpo_ray.attempt": "3"},
    "start_time": 1_700_000_000_000,
}


@pytest.fixture(autouse=True)
def no_token_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def dashboard() -> Iterator[Served]:
    with served({"/api/version": VERSION, "/api/jobs/": [RUNS], "/api/jobs/quickstart-3": RUNS}) as made:
        yield made


def refused(address: str, kind: type[DpoRayError] = InfrastructureError) -> str:
    """Connect in vain; returns the words of the error."""
    with pytest.raises(kind) as error:
        connect(address)
    assert error.value.where
    assert error.value.fix
    assert "\n" not in error.value.what
    return error.value.what


def job(**changes: object) -> Job:
    values: dict = {
        "id": "quickstart-1",
        "status": "FAILED",
        "exit_code": None,
        "message": "",
        "recipe": "quickstart",
        "output": "/shared/runs",
        "attempt": 1,
        "version": "0.1.0",
        "recipe_sha256": "",
        "started": None,
        "ended": None,
    }
    return Job(**(values | changes))


def test_nothing_listens_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert refused(f"http://127.0.0.1:{port}") == "nothing listens at the address"
    assert refused("http://no-such-host.invalid:8265") == "nothing listens at the address"


def test_a_server_that_takes_connections_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_ray.deploy.ray_jobs.server.PROBE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert refused(f"http://127.0.0.1:{silent.getsockname()[1]}") == "there is no answer within 0.3 s"


@pytest.mark.parametrize(
    ("page", "status"),
    [
        ("<html>hello</html>", 200),
        ([1], 200),
        ({"version": 4}, 200),
        ((404, "no"), 404),
        ((302, ""), 302),
        ((500, "x"), 500),
    ],
)
def test_another_http_server_is_no_dashboard(page: object, status: int) -> None:
    with served({"/api/version": page}) as other:
        assert f"(HTTP {status}), but it is not a Ray dashboard" in refused(other.url)


def test_another_ray_is_named_with_both_versions() -> None:
    with served({"/api/version": VERSION | {"ray_version": "2.48.1"}}) as other:
        assert refused(other.url).startswith("the cluster runs Ray 2.48.1, but this machine has Ray 2.60.")


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001", "http://", "http://head:many", "s3://b", ""])
def test_what_is_no_address_of_a_dashboard(address: str) -> None:
    assert "not the address of a Ray dashboard" in refused(address, ConfigError)


def test_an_address_is_completed() -> None:
    assert dashboard_url("head:8265") == "http://head:8265"
    assert dashboard_url("https://ray.example.org/") == "https://ray.example.org"


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_environment_does_not_send_us_elsewhere(
    name: str, dashboard: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served({"/api/version": VERSION}) as elsewhere:
        monkeypatch.setenv(name, elsewhere.url)
        client = connect(dashboard.url)
        assert client.get_address() == dashboard.url
        assert every(client)[0].id == "quickstart-3"
        assert elsewhere.asked == []
        assert os.environ[name] == elsewhere.url


def test_a_token_is_sent_to_whom_asks_for_one_alone(dashboard: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    connect(dashboard.url)
    assert not any("Authorization" in headers for _, headers in dashboard.asked)
    dashboard.token = "mine"
    assert every(connect(dashboard.url))


def test_a_token_is_found_where_ray_finds_it(
    dashboard: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.token = "mine"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine\n")
    connect(dashboard.url)
    (tmp_path / "named").write_text("wrong")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert refused(dashboard.url) == f"the cluster refuses the token from {tmp_path / 'named'}"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    connect(dashboard.url)


def test_no_token(dashboard: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard.token = "theirs"
    assert refused(dashboard.url) == "the cluster requires a token, and none was found on this machine"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/none/token")
    assert refused(dashboard.url).endswith("(/none/token cannot be read)")


def test_an_unknown_job(dashboard: Served) -> None:
    with pytest.raises(ConfigError, match="there is no such job"):
        look(connect(dashboard.url), "quickstart-9")


def test_a_cluster_that_goes_away_meanwhile() -> None:
    with served({"/api/version": VERSION}) as there:
        client = connect(there.url)
    with pytest.raises(InfrastructureError, match="no longer answers"):
        every(client)


def test_a_run_that_goes_on_is_not_submitted_again(dashboard: Served) -> None:
    client = connect(dashboard.url)
    with pytest.raises(LeaseError, match="it is the job quickstart-3, which runs"):
        submit(client, load_recipe(PIPELINES / "quickstart.yaml", ["output=/shared/runs"]), {}, None)


def test_attempts_are_counted_on() -> None:
    ids = ("quickstart-2", "quickstart-10", "quickstart-10-stop", "quickstart-x", "other-77")
    assert next_attempt("quickstart", [job(id=name) for name in ids]) == 11
    assert next_attempt("quickstart", []) == 1


@pytest.mark.parametrize(
    ("status", "exit_code", "message", "code", "words"),
    [
        ("PENDING", None, "", 0, "waits to start"),
        ("RUNNING", None, "", 0, "runs"),
        ("SUCCEEDED", 0, "", 0, "done"),
        ("FAILED", 75, "", 75, "stopped; submit again to go on from what was committed"),
        ("FAILED", 75, LAST_WORDS, 75, "stopped with a checkpoint after step 7 of 90; submit again to go on"),
        ("FAILED", -15, "", 75, "stopped; submit again"),
        ("FAILED", -6, "x\nstopped; the same command goes on from what was committed\n", 75, "stopped; submit again"),
        ("STOPPED", None, "", 75, "stopped at once"),
        ("FAILED", 6, "", 6, "failed with exit code 6: The stored log-probs of the reference model differ"),
        ("FAILED", -9, "", 247, "failed with exit code 247"),
        ("FAILED", None, "Traceback\n  x\nActorDiedError: gone", 9, "failed: ActorDiedError: gone; submit again"),
    ],
)
def test_states_in_words_and_codes(status: str, exit_code: int | None, message: str, code: int, words: str) -> None:
    found = job(status=JobStatus(status).value, exit_code=exit_code, message=message)
    assert found.code == code
    assert found.words.startswith(words)


def test_the_environment_of_a_job(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# ours\nscipy==1.16 # pinned\n\nrich\n")
    made = runtime_environment([str(file), "einops"], [], ["NCCL_SOCKET_IFNAME=eth0", "EMPTY="], set())
    assert made == {
        "pip": ["scipy==1.16", "rich", "einops"],
        "env_vars": {"NCCL_SOCKET_IFNAME": "eth0", "EMPTY": ""},
    }
    assert runtime_environment([], ["einops"], [], set()) == {"uv": ["einops"]}
    assert runtime_environment([], [], [], set()) == {}


@pytest.mark.parametrize(
    ("pip", "uv", "variables", "what"),
    [
        (["a"], ["b"], [], "only one of the two installers"),
        (["./wheel.whl"], [], [], "exists only on this machine"),
        (["-e ."], [], [], "exists only on this machine"),
        (["no-such-file.txt"], [], [], "exists only on this machine"),
        ([], ["x @ https://me:secret@host/x.whl"], [], "the URL contains a password"),
        ([], [], ["HF_TOKEN=hf_1"], "looks like a secret"),
        ([], [], ["AWS_SECRET_ACCESS_KEY=1"], "looks like a secret"),
        ([], [], ["JUDGE=1"], "looks like a secret"),
        ([], [], ["NAME"], "not NAME=VALUE"),
        ([], [], ["1A=2"], "not NAME=VALUE"),
    ],
)
def test_environments_that_are_refused(pip: list[str], uv: list[str], variables: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as refusal:
        runtime_environment(pip, uv, variables, {"JUDGE"})
    assert "hf_1" not in str(refusal.value)


def test_names_that_only_sound_like_secrets_pass() -> None:
    assert runtime_environment([], [], ["TOKENIZERS_PARALLELISM=false", "KEYBOARD=1"], set())["env_vars"]


def test_another_minor_version_of_dpo_ray_does_not_run_the_recipe() -> None:
    same_versions.check(f"dpo-ray=={same_versions.__version__}")
    with pytest.raises(InfrastructureError, match=r"but the run was submitted by dpo-ray 0\.9\.0"):
        same_versions.check("dpo-ray==0.9.0")


def test_the_driver_of_one_job_is_found_and_no_other_process(tmp_path: Path) -> None:
    """Two processes that look like drivers, of two jobs; a third is of the first job but no driver."""
    (tmp_path / "dpo_ray.py").write_text("import sys, time\nprint('up', flush=True)\ntime.sleep(60)\n")

    def start(job_id: str, *words: str) -> subprocess.Popen[str]:
        config = f'{{"metadata": {{"job_submission_id": "{job_id}"}}}}'
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=tmp_path,
            env={"RAY_JOB_CONFIG_JSON_ENV_VAR": config, "PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    other = start("made-job-10", "-m", "dpo_ray", "run", "recipe.yaml")
    helper = start("made-job-1", "dpo_ray.py")
    driver = start("made-job-1", "-m", "dpo_ray", "run", "recipe.yaml")
    try:
        assert stop_driver.driver_of("made-job-1") == driver.pid
        assert stop_driver.main("made-job-1") == 0
        assert driver.wait(10) == -15
        assert (other.poll(), helper.poll()) == (None, None)
        assert stop_driver.driver_of("made-job-1") is None
    finally:
        for process in (other, helper, driver):
            process.kill()
            process.wait()
