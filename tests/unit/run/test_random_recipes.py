"""Whatever values a recipe has, `validate` says that it is valid, or gives one error that names a field and a fix."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from dpo_ray.errors import EXIT_CODES
from tests.conftest import REPOSITORY
from tests.helpers.command_line import call
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
            code, out, err = call(
                capsys, "validate", str(BASES[bool(seed % 2)]), f"output={place / 'runs'}", *arguments
            )
        except Exception as error:
            faults.append(f"seed {seed}: {type(error).__name__}: {error}: {shortened(arguments)}")
            continue
        valid += code == 0
        if fault := fault_of(code, out, err, list(overrides)):
            faults.append(f"seed {seed}: {fault}: {shortened(arguments)}: {err[:300]}")
    assert not faults, "\n".join(faults)
    assert not (place / "runs").exists(), "validate leaves nothing"
    return valid


def fault_of(code: int, out: str, err: str, changed: list[str]) -> str:
    """Return what is wrong with the answer of `validate`; empty if nothing is."""
    if code == 0:
        return "" if "valid;" in out and "error" not in err else "no error, and not valid"
    if code not in EXIT_CODES or err.count("error: ") != 1 or out:
        return "not one error with a documented exit code"
    if "\n  -> " not in err:
        return "no fix"
    said = re.sub(r"\.\d+(?=[.:= ])", "", err)  # without the positions in lists
    sections = [path.rpartition(".")[0] for path in changed]
    named = any(
        re.search(rf"(?<![\w.]){re.escape(place)}(?!\w)", said) for place in [*changed, *filter(None, sections)]
    )
    return "" if named else "no field named"


def shortened(arguments: list[str]) -> str:
    return " ".join(argument[:100] for argument in arguments)
