"""What a driver knows of the job that it runs in."""

from __future__ import annotations

import json

import pytest

from dpo_ray.run.job import JOB_VARIABLE, METADATA, DriverJob, driver_job


def environment(**ours: object) -> dict[str, str]:
    metadata = {"job_submission_id": "aligned-k9d8f", "job_name": "aligned-k9d8f"}
    metadata |= {f"{METADATA}{name}": value for name, value in ours.items()}
    return {JOB_VARIABLE: json.dumps({"runtime_env": {}, "metadata": metadata})}


def test_a_job_of_the_operator_names_its_rayjob() -> None:
    made = environment(rayjob="research/aligned", applied="f00", retries="3", recipe_sha256="abc", recipe="aligned")
    assert driver_job(made) == DriverJob("aligned-k9d8f", "research/aligned", "f00", 3, "abc")


def test_a_submitted_job_has_no_rayjob() -> None:
    assert driver_job(environment(recipe="aligned", attempt="2")) == DriverJob("aligned-k9d8f")


@pytest.mark.parametrize("value", [None, "", "{}", "[]", "no JSON", '{"metadata": null}', '{"metadata": {}}'])
def test_anything_else_is_no_job(value: str | None) -> None:
    assert driver_job({} if value is None else {JOB_VARIABLE: value}) is None


def test_a_number_of_retries_that_is_none_counts_as_none() -> None:
    made = driver_job(environment(rayjob="a/b", retries="many"))
    assert made is not None
    assert made.retries == 0
