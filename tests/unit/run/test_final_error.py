"""Errors that would come again end the next attempts of their RayJob, and of no other run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_ray import errors
from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError, DpoRayError, InfrastructureError, SetupError
from dpo_ray.run import final_error
from dpo_ray.run.final_error import FILE, check_no_final_error, note_final_error
from dpo_ray.run.job import DriverJob
from tests.helpers.good_recipe import GOOD

JOB = DriverJob("aligned-k9d8f", "research/aligned", "f00", 3, "abc")
MISSING = SetupError("vLLM is not installed", where="reference.engine", fix="install it")
FINAL = {
    "DpoRayError": False,  # of no known kind
    "ConfigError": True,
    "DataError": True,
    "ArtifactError": False,  # the storage may be away
    "WriteRefusedError": True,
    "LeaseError": False,
    "LostSightError": False,
    "AuditError": True,
    "TrainError": True,
    "WorkersLostError": False,
    "EngineError": True,
    "InfrastructureError": False,
    "SetupError": True,
    "MemoryLimitError": True,
    "StorageFailedError": False,
    "RayLostError": False,
    "JudgeError": True,
    "JudgeLostError": False,
    "StoppedError": False,
}


def good_recipe(**train: object) -> Recipe:
    return validate_recipe({**GOOD, "train": train}, where="a test")


@pytest.fixture
def directory(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "aligned")


def test_every_kind_of_error_is_final_or_not() -> None:
    kinds = {n: e for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, DpoRayError)}
    assert {name: kind.is_final for name, kind in kinds.items()} == FINAL


def test_the_next_attempts_end_with_the_same_error_as_often_as_there_are_retries(directory: Storage) -> None:
    recipe = good_recipe()
    note_final_error(directory, JOB, recipe, MISSING, attempt=1)
    for _ in range(JOB.retries):
        with pytest.raises(SetupError) as caught:
            check_no_final_error(directory, replace(JOB, id="aligned-another"), recipe)
        assert (caught.value.what, caught.value.where, caught.value.exit_code) == (MISSING.what, MISSING.where, 9)
        assert caught.value.fix.startswith("install it; attempt 1 has found this")
    check_no_final_error(directory, JOB, recipe)  # of a new RayJob, as the operator has no more retries


@pytest.mark.parametrize(
    "changes",
    [{"rayjob": "research/other"}, {"applied": "f01"}, {"applied": ""}, {"recipe_sha256": "of more memory"}],
    ids=["another RayJob", "applied again", "applied by others", "another profile"],
)
def test_another_rayjob_ignores_the_note_and_deletes_it(directory: Storage, changes: dict[str, Any]) -> None:
    note_final_error(directory, JOB, good_recipe(), MISSING, attempt=1)
    check_no_final_error(directory, replace(JOB, **changes), good_recipe())
    assert not directory.exists(FILE)


def test_another_recipe_ignores_the_note(directory: Storage) -> None:
    note_final_error(directory, JOB, good_recipe(), MISSING, attempt=1)
    check_no_final_error(directory, JOB, good_recipe(steps=77))


def test_another_version_ignores_the_note(directory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    note_final_error(directory, JOB, good_recipe(), MISSING, attempt=1)
    monkeypatch.setattr(final_error, "__version__", "99.0")
    check_no_final_error(directory, JOB, good_recipe())


@pytest.mark.parametrize(
    ("error", "job"),
    [
        (InfrastructureError("Ray does not answer"), JOB),
        (MISSING, replace(JOB, retries=0)),
        (MISSING, DriverJob("aligned-1")),
    ],
    ids=["it may pass", "no retries", "no RayJob"],
)
def test_nothing_is_noted_that_saves_no_attempt(directory: Storage, error: DpoRayError, job: DriverJob) -> None:
    note_final_error(directory, job, good_recipe(), error, attempt=1)
    assert not directory.exists(FILE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"retries_left": 2, "attempt": 1, "kind": "EXIT_CODES"}', "null"])
def test_a_note_that_cannot_be_read_stops_nobody(directory: Storage, text: str) -> None:
    directory.write(FILE, text.encode())
    check_no_final_error(directory, JOB, good_recipe())
    assert not directory.exists(FILE)


def test_a_note_names_only_errors(directory: Storage) -> None:
    note_final_error(directory, JOB, good_recipe(), ConfigError("x"), attempt=1)
    note = json.loads(directory.read_bytes(FILE)) | {"kind": "annotations"}
    directory.write(FILE, json.dumps(note).encode())
    check_no_final_error(directory, JOB, good_recipe())
