"""What an attempt leaves in the run's directory: numbers, its end, and copies of logs that outlive their driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ArtifactError, SetupError
from dpo_ray.run import attempt as attempt_module
from dpo_ray.run.attempt import KEPT_ATTEMPTS, attempt, attempts
from dpo_ray.run.copy_logs import CUT, Copy
from dpo_ray.run.job import JOB_VARIABLE
from dpo_ray.run.redact import secret_values, without_secrets
from tests.helpers.good_recipe import GOOD

METADATA = {"job_submission_id": "wrong-k9d8f", "dpo_ray.rayjob": "lab/wrong", "dpo_ray.retries": "2"}
SECRET = "hf_0123456789abcdef"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return validate_recipe({**GOOD, "output": str(tmp_path)}, where="a test")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"metadata": METADATA}))
    monkeypatch.setattr(attempt_module, "STANDARD_OUTPUT", Path("/dev/null"))  # pytest's is not a driver's


def ended(directory: Path, number: int) -> object:
    return json.loads((directory / f"wrong/logs/attempt-{number}/attempt.json").read_text()).get("exit_code")


def test_a_run_that_is_no_job_leaves_no_logs(recipe: Recipe, tmp_path: Path) -> None:
    with attempt(recipe, pytest.fail, None):
        pass
    assert not (tmp_path / "wrong").exists()


@pytest.mark.usefixtures("job")
def test_attempts_are_numbered_and_say_how_they_ended(recipe: Recipe, tmp_path: Path) -> None:
    lines: list[str] = []
    with attempt(recipe, lines.append, None):
        assert ended(tmp_path, 1) is None
    with pytest.raises(KeyError), attempt(recipe, lines.append, None):
        raise KeyError("a bug")
    with pytest.raises(ArtifactError), attempt(recipe, lines.append, None):
        raise ArtifactError("away")
    assert [ended(tmp_path, n) for n in (1, 2, 3)] == [0, 1, 4]
    assert lines[2] == f"attempt 3; its logs are kept in {tmp_path}/wrong/logs/attempt-3"


@pytest.mark.usefixtures("job")
def test_a_final_error_ends_the_next_attempts_before_they_begin(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SetupError), attempt(recipe, lambda _: None, None):
        raise SetupError("vLLM is not installed", fix="install it")
    for _ in range(2):
        with pytest.raises(SetupError, match="vLLM is not installed"), attempt(recipe, pytest.fail, None):
            pytest.fail("the attempt began")
    assert attempts(Storage(tmp_path / "wrong")) == [1], "the logs of what was found are not pushed out"
    with attempt(recipe, lambda _: None, None):  # of a RayJob that was applied again
        pass


@pytest.mark.usefixtures("job")
def test_the_logs_of_the_last_attempts_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    for _ in range(KEPT_ATTEMPTS + 3):
        with attempt(recipe, lambda _: None, None):
            pass
    assert attempts(Storage(tmp_path / "wrong")) == list(range(4, KEPT_ATTEMPTS + 4))


DRIVER = """
import sys, time
from pathlib import Path
from dpo_ray.config.load import load_recipe
from dpo_ray.run.attempt import attempt
with attempt(load_recipe(Path(sys.argv[1]), []), print, None):
    print("the key is hf_0123456789abcdef", flush=True)
    time.sleep(600)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_driver_that_is_killed_leaves_its_log_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({**GOOD, "output": str(tmp_path)}))
    printed, log = tmp_path / "printed", tmp_path / "wrong/logs/attempt-1/driver.log"
    environment = os.environ | {JOB_VARIABLE: json.dumps({"metadata": METADATA}), "HF_TOKEN": SECRET}
    with printed.open("wb") as stream:
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "recipe.yaml")]
        driver = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    wait_for(lambda: SECRET in printed.read_text())
    with printed.open("ab") as stream:
        stream.write(b"an unfinished line")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: log.exists() and log.read_text().endswith("unfinished line"))
    assert log.read_text().splitlines()[-2:] == ["the key is ***", "an unfinished line"]


def test_a_copy_keeps_secrets_whole_and_ends_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, storage = tmp_path / "source", Storage(tmp_path / "copies")
    storage.write("driver.log", b"")
    source.write_text("first\nthe key is hf_01234")
    copy = Copy(storage, source, "driver.log", [SECRET])
    copy.advance()
    assert storage.read_bytes("driver.log") == b"first\n"
    with source.open("a") as stream:
        stream.write("56789abcdef\n")
    copy.advance()
    assert storage.read_bytes("driver.log") == b"first\nthe key is ***\n"
    monkeypatch.setattr("dpo_ray.run.copy_logs.MAX_BYTES", 25)
    with source.open("a") as stream:
        stream.write("x" * 100 + "\n")
    copy.advance()
    copy.advance(is_last=True)
    assert storage.read_bytes("driver.log") == b"first\nthe key is ***\nxxxx" + CUT


def test_what_the_storage_did_not_take_is_written_later(tmp_path: Path) -> None:
    source, storage = tmp_path / "source", Storage(tmp_path / "copies")
    source.write_text("first\n")
    copy = Copy(storage, source, "driver.log", [])
    with pytest.raises(FileNotFoundError):
        copy.advance()
    (tmp_path / "copies").mkdir()
    copy.advance(is_last=True)
    assert storage.read_bytes("driver.log") == b"first\n"


def test_secrets_are_those_of_variables_with_such_names() -> None:
    variables = {"HF_TOKEN": SECRET, "OPENAI_API_KEY": "sk-01234567", "A_TOKEN": "true", "HOME": "/home/someone"}
    assert secret_values(variables) == [SECRET, "sk-01234567"]
    assert without_secrets(f"s3://me:pass@host/x?sig=1 {SECRET}", [SECRET]) == "s3://host/x?sig=1 ***".replace(
        "?sig=1", ""
    )
