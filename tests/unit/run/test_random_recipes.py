"""Whatever values a recipe has, `validate` says that it is valid, or gives one error that names a field and a fix."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from dpo_ray.cli.recipe import validate
from dpo_ray.errors import EXIT_CODES, DpoRayError
from tests.conftest import REPOSITORY
from tests.helpers.random_overrides import random_overrides

EXAMPLES, MORE_EXAMPLES = 300, 20_000
BASES = {False: REPOSITORY / "pipelines/quickstart.yaml", True: REPOSITORY / "pipelines/quickstart_online.yaml"}


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


def validate_random_recipes(
    seeds: range, capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Validate a recipe of each seed; return how many are valid. What is wrong with an error is raised for all at once."""
    monkeypatch.chdir(REPOSITORY)  # some values are paths in it
    faults, valid = [], 0
    for seed in seeds:
        overrides = random_overrides(random.Random(seed), online=bool(seed % 2))
        arguments = [f"{path}={text}" for path, text in overrides.items()]
        try:
            validate(BASES[bool(seed % 2)], [f"output={place / 'runs'}", *arguments])
            fault = "" if "valid;" in capsys.readouterr().out else "not an error, and not valid"
            valid += 1
        except DpoRayError as error:
            fault = fault_of(error, list(overrides))
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            faults.append(f"seed {seed}: {fault}: {' '.join(argument[:100] for argument in arguments)}")
    assert not faults, "\n".join(faults)
    assert not (place / "runs").exists(), "validate leaves nothing"
    return valid


def fault_of(error: DpoRayError, changed: list[str]) -> str:
    """Return what is wrong with an error of `validate`; empty if it names a fix, and a changed field or its section."""
    if error.exit_code not in EXIT_CODES or not error.fix:
        return f"no fix, or no exit code: {error}"
    said = re.sub(r"\.\d+(?=[.:= ])", "", str(error))  # without the positions in lists
    places = [*changed, *filter(None, (path.rpartition(".")[0] for path in changed))]
    named = any(re.search(rf"(?<![\w.]){re.escape(place)}(?!\w)", said) for place in places)
    return "" if named else f"no field named: {error}"
