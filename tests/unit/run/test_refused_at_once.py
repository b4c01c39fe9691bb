"""What a run would meet only in its stages is refused by `validate`, `plan` and `run` alike, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_ray.cli.app import main
from dpo_ray.models.builtin import builtin_model
from tests.helpers.command_line import call
from tests.helpers.good_recipe import good

SHORT = {"max_new_tokens": 16}
ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize(
    ("rows", "overrides", "says"),
    [
        ([ROW | {"rejected": "b"}] * 200, (), ("data.train, rows.jsonl", "first 100 rows", "IDENTICAL_PAIR")),
        ([{"question": "a", "good": "b", "bad": "c"}], (), ("data.train", "UNKNOWN_FORMAT", "format and columns")),
        ([ROW | {"chosen": "\x1b[31mb"}], (), ("CONTROL_CHARS", "data.rules.control_characters=clean")),
        ([ROW], ("data.chat_template=refuses.jinja",), ("TEMPLATE_ERROR", "only tools")),
        ([ROW], ("data.max_length_tokens=2", "data.truncation=drop"), ("data.train", "raise data.max_length_tokens")),
        ([{"prompt": "a", "completion": "b", "label": True}], (), ("`sigmoid` learns only from pairs",)),
    ],
)
def test_data_that_a_recipe_cannot_use_is_refused_from_its_first_rows(
    rows: list[dict],
    overrides: tuple[str, ...],
    says: tuple[str, ...],
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(good())
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("refuses.jinja").write_text("{{ raise_exception('only tools') }}")
    with pytest.raises(SystemExit) as stopped:
        main([command, "good.yaml", "data.train=rows.jsonl", *overrides])
    error = capsys.readouterr().err
    assert stopped.value.code == 3, error
    assert all(words in error for words in says), error
    assert not Path("runs").exists()


def test_a_recipe_whose_first_rows_are_partly_unsound_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(good())
    Path("rows.jsonl").write_text("{\n" * 99 + json.dumps(ROW) + "\n" + "{\n")
    code, out, err = call(capsys, "validate", "good.yaml", "data.train=rows.jsonl")
    assert (code, err) == (0, "")
    assert "valid; 2 data shards" in out


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_a_disk_without_room_for_a_checkpoint_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(good())
    parameters = sum(
        np.prod(t.shape) for t in load_file(builtin_model("sentiment_llama") / "model.safetensors").values()
    )
    for free, fits in ((16 * parameters - 1, False), (16 * parameters, True)):  # weight, two moments, and the policy
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            if command != "run":
                assert call(capsys, command, "good.yaml")[0] == 0
            continue
        code, _, err = call(capsys, command, "good.yaml")
        assert code == 9
        assert "output=runs: a checkpoint and the policy take" in err


def test_code_that_cannot_be_confined_here_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpo_ray.online.judges.verifier.can_confine", lambda: False)
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a", "answer": "assert f() == 1"}) + "\n")
    judge = {"type": "verifier", "check": "unit_test"}
    Path("good.yaml").write_text(good(online={"judge": judge, "prompts": "prompts.jsonl", "sampling": SHORT}))
    code, _, err = call(capsys, "validate", "good.yaml")
    assert code == 2
    assert "online.judge.check=unit_test" in err
    assert call(capsys, "validate", "good.yaml", "online.judge.allow_unconfined=true")[0] == 0
    assert call(capsys, "validate", "good.yaml", "ray.address=auto")[0] == 0, "the judge works on another machine"


def test_a_verifier_needs_a_reference_answer_in_the_first_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    Path("good.yaml").write_text(
        good(online={"judge": {"type": "verifier", "check": "exact"}, "prompts": "prompts.jsonl", "sampling": SHORT})
    )
    code, _, err = call(capsys, "validate", "good.yaml")
    assert code == 3
    assert "online.prompts: none of the first 1 rows has a reference answer" in err
