"""Whatever values a recipe has, `validate` says that it is valid, or gives one error that names a field and a fix."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from dpo_ray.cli.recipe import validate
from dpo_ray.errors import EXIT_CODES, DpoRayError
from tests.conftest import REPOSITORY
from tests.helpers.random_overrides import TEXT_FIELDS, TEXTS, as_yaml, random_overrides

EXAMPLES, MORE_EXAMPLES = 300, 10_000
BASES = {False: REPOSITORY / "pipelines/quickstart.yaml", True: REPOSITORY / "pipelines/quickstart_online.yaml"}
TEXTS_WITHIN = [  # fields below a list, or of a section of several types; %s is the text
    *("data.train={type: files, path: %s}", "online.prompts={type: files, path: %s}", "data.eval={x: %s}"),
    *("data.train={type: files, path: tests/corpus/rows.jsonl, columns: {prompt: %s}}", "data.rules.filters=[%s]"),
    *("online.judge={type: reward_model, path: %s}", "online.judge={type: verifier, check: exact, extract: %s}"),
    *("online.judge={type: llm, base_url: http://host, model: m, api_key_env: %s}", "train.lora.target_modules=[%s]"),
]


def test_random_recipes_are_valid_or_refused_in_one_clear_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = validate_random_recipes(range(EXAMPLES), capsys, tmp_path, monkeypatch)
    assert EXAMPLES / 5 < valid < EXAMPLES * 4 / 5, "most examples should not be of one kind"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_random_recipes_are_valid_or_refused_in_one_clear_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_random_recipes(range(EXAMPLES, EXAMPLES + MORE_EXAMPLES), capsys, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("field", [*TEXT_FIELDS, *TEXTS_WITHIN])
def test_any_text_in_any_field_is_valid_or_refused_in_one_clear_error(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    path, _, value = field.partition("=")
    texts = [text for text in map(as_yaml, TEXTS) if not value or "\n" not in text]
    overrides = [f"{path}={value % text if value else text}" for text in texts]
    recipe, evaluates = BASES[path.startswith("online.")], "train.eval_every_steps=5"
    faults = [outcome(recipe, [f"output={tmp_path / 'runs'}", evaluates, each], [path]) for each in overrides]
    assert not any(faults), "\n".join(filter(None, faults))


def validate_random_recipes(
    seeds: range, capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Validate a recipe of each seed; return how many are valid. What is wrong with an error is raised for all at once."""
    monkeypatch.chdir(REPOSITORY)  # some values are paths in it
    faults, valid = [], 0
    for seed in seeds:
        overrides = random_overrides(random.Random(seed), online=bool(seed % 2))
        arguments = [f"{path}={text}" for path, text in overrides.items()]
        fault = outcome(BASES[bool(seed % 2)], [f"output={place / 'runs'}", *arguments], list(overrides))
        valid += "valid;" in capsys.readouterr().out
        if fault:
            faults.append(f"seed {seed}: {fault}")
    assert not faults, "\n".join(faults)
    assert not (place / "runs").exists(), "validate leaves nothing"
    return valid


def outcome(recipe: Path, arguments: list[str], changed: list[str]) -> str:
    """Validate a recipe; return what is wrong with an error, empty if nothing is."""
    try:
        validate(recipe, arguments)
        return ""
    except DpoRayError as error:
        fault = fault_of(error, changed)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return fault and f"{fault}: {' '.join(argument[:100] for argument in arguments)}"


def fault_of(error: DpoRayError, changed: list[str]) -> str:
    """Return what is wrong with an error of `validate`; empty if it names a fix, and a changed field or its section."""
    if error.exit_code not in EXIT_CODES or not error.fix:
        return f"no fix, or no exit code: {error}"
    said = re.sub(r"\.\d+(?=[.:= ])", "", str(error))  # without the positions in lists
    places = [*changed, *filter(None, (path.rpartition(".")[0] for path in changed))]
    named = any(re.search(rf"(?<![\w.]){re.escape(place)}(?!\w)", said) for place in places)
    return "" if named else f"no field named: {error}"
