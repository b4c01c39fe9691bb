"""The command line as a person and a script meet it; nothing here starts Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpo_ray.cli import main
from dpo_ray.errors import EXIT_CODES

COMMANDS = {
    "run": ["RECIPE", "KEY.PATH=VALUE", "--json", "--verbose"],
    "plan": ["RECIPE", "KEY.PATH=VALUE", "--json"],
    "validate": ["RECIPE", "KEY.PATH=VALUE", "--json"],
    "schema": [],
    "init": ["RECIPE", "recipe.yaml"],
    "report": ["RECIPE", "KEY.PATH=VALUE"],
    "inspect": ["data"],
    "doctor": ["--output", "--json"],
}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, out, err


@pytest.fixture
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "init", "my.yaml")
    assert code == 0
    assert "next: dpo-ray run my.yaml" in out
    return tmp_path / "my.yaml"


@pytest.mark.parametrize("width", [80, 120])
def test_help_lists_the_commands_and_one_line_for_each_exit_code(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(re.search(rf"│ {command} ", out) for command in COMMANDS)
    assert all(re.search(rf"• {exit_code}: \w", out) for exit_code in EXIT_CODES)
    assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert f"Usage: dpo-ray {command}" in out
    assert all(word in out for word in COMMANDS[command])


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = call(capsys)
    assert "Usage: dpo-ray" in out + err


def test_an_unknown_command_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "trian")
    assert code == 2
    assert err.count("error:") == 1
    assert "trian" in err


def test_init_writes_a_recipe_that_is_valid(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "validate", "my.yaml")
    assert (code, out) == (0, "my.yaml: valid; 2 data shards\n")
    assert [p.name for p in starter.parent.iterdir()] == ["my.yaml"]


def test_init_never_writes_over_a_file(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starter.write_text("mine")
    code, _, err = call(capsys, "init", "my.yaml")
    assert code == 2
    assert "there is a file of this name already" in err
    assert starter.read_text() == "mine"


def test_init_into_a_directory_that_is_not_there_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "init", str(tmp_path / "none" / "r.yaml"))
    assert code == 2
    assert "cannot be written: No such file or directory" in err


def test_validate_prints_the_resolved_recipe_for_scripts(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "validate", "my.yaml", "train.objective.beta=0.5", "--json")
    resolved = json.loads(out)
    assert code == 0
    assert resolved["train"]["objective"] == {"type": "sigmoid", "beta": 0.5, "label_smoothing": 0.0}
    assert resolved["reference"]["audit"]["groups"] == 64


def test_plan_is_json_for_scripts_and_a_table_for_people(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "my.yaml", "--json")
    made = json.loads(out)
    assert code == 0
    assert made["name"] == "my-run"
    assert [s["stage"] for s in made["stages"]] == ["prepare", "reference", "schedule", "train", "evaluate"]
    assert {s["state"] for s in made["stages"]} == {"missing"}
    assert all(re.fullmatch("[0-9a-f]{20}", s["key"]) for s in made["stages"])
    _, out, _ = call(capsys, "plan", "my.yaml")
    assert all(s["key"] in out for s in made["stages"])
    assert out.count("not run yet") == 5
    assert [p.name for p in starter.parent.iterdir()] == ["my.yaml"]


def test_schema_is_a_json_schema_of_all_sections(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schema")
    assert code == 0
    assert set(json.loads(out)["properties"]) >= {"name", "output", "seed", "model", "data", "reference", "train"}


def test_a_report_of_a_run_that_is_not_done_says_so(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "report", "my.yaml")
    assert code == 4
    assert "the stage `prepare` is not done" in err
    assert [p.name for p in starter.parent.iterdir()] == ["my.yaml"]


def test_doctor_tells_scripts_what_it_found_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "doctor", "--output", str(tmp_path / "new" / "runs"), "--json")
    findings = {f["what"]: f for f in json.loads(out)}
    assert {"Python", "torch", "ray", "CPU", "GPU", "vLLM", "memory", "disk"} <= set(findings)
    assert findings["torch"]["state"] == "ok"
    assert findings[f"storage {tmp_path / 'new' / 'runs'}"]["state"] == "ok"
    assert code == (9 if any(f["state"] == "broken" for f in findings.values()) else 0)
    assert all(f["fix"] for f in findings.values() if f["state"] == "broken")
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_that_a_place_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    code, out, _ = call(capsys, "doctor", "--output", str(tmp_path / "file" / "runs"), "--json")
    broken = [f for f in json.loads(out) if f["what"].startswith("storage")]
    assert code == 9
    assert [f["state"] for f in broken] == ["broken"]
    assert broken[0]["fix"]
