"""Submission of a recipe to a running Ray cluster. The driver runs on the cluster's head, independently of this machine."""

from __future__ import annotations

import hashlib
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from dpo_ray import __version__
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import InfrastructureError, LeaseError
from dpo_ray.run.job import METADATA

from .jobs import ALREADY, Job, every
from .server import answers
from .working_directory import RECIPE_FILE, fill

ENTRYPOINT = (
    f"python -m dpo_ray.deploy.ray_jobs.same_versions dpo-ray=={shlex.quote(__version__)}"
    f" && exec python -m dpo_ray run {RECIPE_FILE} ray.address=auto"  # exec: a signal to the process of the job reaches the driver
)


@dataclass(frozen=True)
class Submitted:
    """A submitted job: its id, and the names of the files that were uploaded."""

    id: str
    files: list[str]


def submit(client: JobSubmissionClient, recipe: Recipe, environment: dict[str, Any], code: Path | None) -> Submitted:
    """Submit a recipe as a Ray job, which then runs on the cluster's head.

    If an earlier job of this run failed or was stopped, the new job continues from the artifacts of the earlier job.
    The ids of the jobs differ only in their last part, the number of the attempt.

    Args:
        environment: Ray's runtime environment, without a working directory.
        code: a directory with the user's code to upload, or None.

    Raises:
        ConfigError: the recipe contains a path that only this machine can access, or the upload would be too large.
        LeaseError: the same run is still active on the cluster.
        InfrastructureError: the cluster does not answer, or refuses the job.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-ray-submit-") as directory:
        files = fill(Path(directory), recipe, code)
        digest = hashlib.sha256((Path(directory) / RECIPE_FILE).read_bytes()).hexdigest()
        jobs = every(client)
        _check_not_going_on(recipe, jobs, client.get_address())
        attempt = next_attempt(recipe.name, jobs)
        try:
            with answers(client.get_address()):
                job_id = client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=f"{recipe.name}-{attempt}",
                    runtime_env={**environment, "working_dir": directory},
                    metadata={
                        f"{METADATA}recipe": recipe.name,
                        f"{METADATA}output": recipe.output,
                        f"{METADATA}version": __version__,
                        f"{METADATA}recipe_sha256": digest,
                        f"{METADATA}attempt": str(attempt),
                    },
                )
        except InfrastructureError as error:
            if ALREADY not in error.what:
                raise
            what = f"another user has just submitted {recipe.name}-{attempt}"
            fix = "`dpo-ray list` shows it; if it is another run of this name, submit again"
            raise LeaseError(what, where=f"{recipe.name} at {client.get_address()}", fix=fix) from error
    return Submitted(job_id, files)


def next_attempt(name: str, jobs: list[Job]) -> int:
    """Return the number for the next job of a run: one more than the highest number among its jobs in any state."""
    matches = [re.fullmatch(rf"{re.escape(name)}-(\d+)", job.id) for job in jobs]
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def _check_not_going_on(recipe: Recipe, jobs: list[Job], place: str) -> None:
    for job in jobs:
        if not job.is_over and (job.recipe, job.output) == (recipe.name, recipe.output):
            raise LeaseError(
                f"this run is already active: it is the job {job.id}, which {job.words}",
                where=f"{recipe.name} at {place}",
                fix=f"dpo-ray logs {job.id} -f follows it, dpo-ray stop {job.id} stops it; for another run, choose another `name`",
            )
