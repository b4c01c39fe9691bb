"""The Ray job that this driver runs in, from the metadata that whoever submitted the job has given to it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

METADATA = "dpo_ray."  # the prefix of our metadata
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's job server sets it for the driver


@dataclass(frozen=True)
class DriverJob:
    """The Ray job of a driver, and the RayJob that has made it, if the KubeRay operator runs the recipe."""

    id: str  # Ray's submission id
    rayjob: str = ""  # NAMESPACE/NAME; empty: the job was submitted by somebody else
    applied: str = ""  # differs between two RayJobs of one name; empty if the manifest was not applied by dpo-ray
    retries: int = 0  # how often the operator starts a failed run again
    recipe_sha256: str = ""  # of the recipe with its profile of the cluster, which the driver's recipe lacks


def driver_job(environment: Mapping[str, str] = os.environ) -> DriverJob | None:
    """Return the Ray job of this process, or None if this process is not the driver of a submitted job."""
    try:
        metadata = json.loads(environment.get(JOB_VARIABLE, "{}"))["metadata"]
        submission = str(metadata["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None
    ours = {name.removeprefix(METADATA): str(value) for name, value in metadata.items() if name.startswith(METADATA)}
    retries = ours.get("retries", "0")
    return DriverJob(
        submission,
        ours.get("rayjob", ""),
        ours.get("applied", ""),
        int(retries) if retries.isdecimal() else 0,
        ours.get("recipe_sha256", ""),
    )
