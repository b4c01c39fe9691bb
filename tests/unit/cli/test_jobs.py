"""The commands for jobs, as a user types them, against a server that answers as a dashboard does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.command_line import call
from tests.helpers.fakes.http_server import Served, served

PIPELINES = Path(__file__).resolve().parents[3] / "pipelines"
OURS = {
    "type": "SUBMISSION",
    "submission_id": "small-2",
    "status": "FAILED",
    "entrypoint": "python",
    "driver_exit_code": 75,
    "metadata": {"dpo_ray.recipe": "small", "dpo_ray.output": "/shared"},
    "start_time": 1_700_000_100_000,
    "end_time": 1_700_000_165_000,
}
EARLIER = OURS | {"submission_id": "small-1", "driver_exit_code": 7, "start_time": 1_700_000_000_000}
STOPS = OURS | {"submission_id": "small-2-stop", "metadata": {"dpo_ray.stops": "small-2"}}
THEIRS = OURS | {"submission_id": "raysubmit_x", "metadata": {}}
COMMANDS = {
    "submit": ["RECIPE", "KEY.PATH=VALUE", "--address", "--working-dir", "--pip", "--uv", "--env", "--wait"],
    "status": ["ID", "--address", "--json"],
    "logs": ["ID", "--address", "--follow"],
    "stop": ["ID", "--address", "--grace-seconds"],
    "list": ["--address", "--json"],
}


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    pages = {
        "/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": "c", "session_name": "s"},
        "/api/jobs/": [EARLIER, THEIRS, STOPS, OURS],
        "/api/jobs/small-2": OURS,
        "/api/jobs/small-2/logs": {"logs": "one\ntwo"},
    }
    with served(pages) as made:
        monkeypatch.setenv("DPO_RAY_ADDRESS", made.url)
        yield made


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert f"Usage: dpo-ray {command}" in out
    assert all(word in out for word in COMMANDS[command])


def test_without_an_address_it_is_asked_for_and_ray_address_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPO_RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    code, _, err = call(capsys, "list")
    assert code == 2
    assert "--address" in err
    assert "DPO_RAY_ADDRESS" in err


def test_list_knows_the_jobs_that_the_operator_made(dashboard: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """With our metadata, which the manifest holds, or only known by their command."""
    rendered = OURS | {
        "submission_id": "small-24652",  # the operator's suffix, which may consist of digits
        "entrypoint": "dpo-ray run /etc/dpo-ray/recipe.yaml",
        "metadata": {
            "dpo_ray.recipe": "small",
            "dpo_ray.output": "/mnt/shared/runs",
            "dpo_ray.rayjob": "default/small",
        },
    }
    older = rendered | {"submission_id": "small-x7k2p", "metadata": {}, "start_time": 1_600_000_000_000}
    dashboard.pages["/api/jobs/"] = (200, json.dumps([older, THEIRS, rendered]))
    code, out, _ = call(capsys, "list", "--json")
    listed = {job["id"]: job for job in json.loads(out)}
    assert (code, list(listed)) == (0, ["small-24652", "small-x7k2p"])
    assert (listed["small-24652"]["output"], listed["small-24652"]["attempt"]) == ("/mnt/shared/runs", 0)


def test_list_shows_runs_alone_and_the_newest_first(dashboard: Served, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "list", "--json")
    listed = json.loads(out)
    assert (code, [job["id"] for job in listed]) == (0, ["small-2", "small-1"])
    assert [job["code"] for job in listed] == [75, 7]
    code, out, _ = call(capsys, "list")
    assert "65 s" in out
    assert "raysubmit_x" not in out
    dashboard.pages["/api/jobs/"] = (200, "[]")
    assert call(capsys, "list")[1] == "no run has been submitted to this cluster since it started\n"


def test_status_says_what_to_do(dashboard: Served, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "status", "small-2")
    assert (code, out) == (0, "small-2: stopped; submit again to go on from what was committed (65 s)\n")


def test_logs_of_a_job_that_is_over(dashboard: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "logs", "small-2")[:2] == (0, "one\ntwo")
    code, out, err = call(capsys, "logs", "small-2", "-f")
    assert (code, out) == (75, "one\ntwo")
    assert err.endswith("small-2: stopped; submit again to go on from what was committed (65 s)\n")


def test_a_job_that_is_over_is_not_stopped_again(dashboard: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "stop", "small-2")[0] == 0
    assert {path for path, _ in dashboard.asked} == {"/api/version", "/api/jobs/small-2"}


def test_what_is_wrong_with_a_recipe_is_said_before_the_cluster_is_asked(
    dashboard: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(PIPELINES / "quickstart.yaml")
    assert "no such recipe" in call(capsys, "submit", "none.yaml")[2]
    assert "train.objective.beta" in call(capsys, "submit", recipe, "train.objective.beta=-1")[2]
    assert "looks like a secret" in call(capsys, "submit", recipe, "--env", "HF_TOKEN=hf_secret")[2]
    assert dashboard.asked == []
    code, _, err = call(capsys, "submit", recipe)
    assert code == 2
    assert "output=runs: a relative path has another meaning on the cluster" in err
    assert {path for path, _ in dashboard.asked} <= {"/api/version"}
