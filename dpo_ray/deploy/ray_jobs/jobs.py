"""The jobs on a Ray cluster that run recipes: their state, described for a user, and how to stop a job."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from dpo_ray.errors import EXIT_CODES, InfrastructureError, StoppedError
from dpo_ray.run.job import METADATA

from . import stop_driver
from .server import answers, last_line

STOPS = f"{METADATA}stops"
RUNS = re.compile(r"dpo[-_]ray run ")  # in the entrypoint of a job that runs a recipe
CHECKPOINT_STEP = re.compile(r"asked to stop, and stopped after step (\d+) of (\d+)")  # in the last output of a driver
DRIVER_STOPPED = "stopped; the same command goes on"  # a driver's last output; Ray's threads may then abort the process
ALREADY = "already exists"  # in Ray's error for a second job of the same name
POLL_SECONDS = 2.0
ASK_SECONDS = 90.0  # in which the head must start the small job that signals a driver
ENDING_SECONDS = 120.0  # after Ray's own stop


@dataclass(frozen=True)
class Job:
    """One submitted job, with times in seconds since 1970. `exit_code` is None if its driver did not end by itself."""

    id: str
    status: str
    exit_code: int | None
    message: str
    recipe: str
    output: str
    attempt: int
    version: str
    recipe_sha256: str
    started: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        """Return True if the driver has ended or will never start."""
        return JobStatus(self.status).is_terminal()

    @property
    def code(self) -> int:
        """Return the exit code that `dpo-ray run` would have had; return 0 while the job is not over."""
        if self.exit_code is not None:
            stopped = self.exit_code in (-15, 143) or (self.exit_code < 0 and DRIVER_STOPPED in self.message)
            return StoppedError.exit_code if stopped else self.exit_code % 256
        if self.status == JobStatus.STOPPED:
            return StoppedError.exit_code
        return InfrastructureError.exit_code if self.status == JobStatus.FAILED else 0

    @property
    def words(self) -> str:
        """Return the state of the job in words, and what to do next."""
        if self.status == JobStatus.PENDING:
            return "waits to start"
        if self.status == JobStatus.RUNNING:
            return "runs"
        if self.code == 0:
            return "done"
        if self.code == StoppedError.exit_code:
            if step := CHECKPOINT_STEP.search(self.message):
                return f"stopped with a checkpoint after step {step[1]} of {step[2]}; submit again to go on"
            how = "stopped at once" if self.exit_code is None else "stopped"
            return f"{how}; submit again to go on from what was committed"
        if self.exit_code is None:
            return f"failed: {last_line(self.message)}; submit again to go on"
        meaning = EXIT_CODES.get(self.code, "the traceback in its logs shows where").splitlines()[0].rstrip(".")
        return f"failed with exit code {self.code}: {meaning}"


def look(client: JobSubmissionClient, job: str) -> Job:
    """Return the state of one job.

    Raises:
        ConfigError: the cluster has no such job.
        InfrastructureError: the cluster does not answer.
    """
    with answers(client.get_address(), job):
        return _job(client.get_job_info(job))


def every(client: JobSubmissionClient) -> list[Job]:
    """List all jobs that run recipes, the newest first: those that `submit` made, and those that the operator made."""
    with answers(client.get_address()):
        every_job = client.list_jobs()
    ours = [_job(details) for details in every_job if _runs_a_recipe(details)]
    return sorted(ours, key=lambda job: (-(job.started or 0), job.id))


def stop(client: JobSubmissionClient, job: str, grace_seconds: float, say: Callable[[str], None]) -> Job:
    """Stop a job after it has written a checkpoint, and return its final state.

    The driver gets SIGTERM and writes a checkpoint after its current step. If the driver has not ended after
    `grace_seconds`, Ray stops it without a checkpoint. If this function is called again for the same job, it sends no
    second SIGTERM, which would end the driver at once; it only waits.

    Raises:
        ConfigError: the cluster has no such job.
        InfrastructureError: the cluster does not answer, or the job does not end.
    """
    state = look(client, job)
    if state.is_over:
        return state
    if state.status == JobStatus.RUNNING and grace_seconds > 0 and _signal_driver(client, state.id):
        say(f"{state.id}: asked to stop; it ends after its step and a checkpoint (waiting up to {grace_seconds:g} s)")
        state = _until_over(client, state.id, grace_seconds)
        if not state.is_over:
            say(f"{state.id}: still running after {grace_seconds:g} s")
    if not state.is_over:
        say(f"{state.id}: stopped by Ray, without a checkpoint of its own")
        with answers(client.get_address(), state.id):
            client.stop_job(state.id)
        state = _until_over(client, state.id, ENDING_SECONDS)
    if not state.is_over:
        fix = "check on the dashboard whether the head is still running"
        what = f"the job has not ended {ENDING_SECONDS:g} s after Ray was asked to stop it"
        raise InfrastructureError(what, where=job, fix=fix)
    return state


def _signal_driver(client: JobSubmissionClient, job: str) -> bool:
    """Send SIGTERM to a job's driver, only once for each job; return False if there is no driver.

    A second job sends the signal: Ray runs jobs on the head, where the driver runs as well.
    """
    place, signals = client.get_address(), f"{job}-stop"
    with tempfile.TemporaryDirectory(prefix="dpo-ray-stop-") as directory:
        script = Path(stop_driver.__file__)
        shutil.copyfile(script, Path(directory) / script.name)
        try:
            with answers(place):
                client.submit_job(
                    entrypoint=f"python {script.name} {shlex.quote(job)}",
                    submission_id=signals,
                    metadata={STOPS: job},
                    runtime_env={"working_dir": directory},
                )
        except InfrastructureError as error:
            if ALREADY not in error.what:
                raise
    return _until_over(client, signals, ASK_SECONDS).status == JobStatus.SUCCEEDED


def _until_over(client: JobSubmissionClient, job: str, seconds: float) -> Job:
    until = time.monotonic() + seconds
    while not (state := look(client, job)).is_over and time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
    return state


def _runs_a_recipe(details: JobDetails) -> bool:
    """Return whether a job runs a recipe. A RayJob that an older dpo-ray has rendered is recognised by its command."""
    return f"{METADATA}recipe" in (details.metadata or {}) or bool(RUNS.search(details.entrypoint or ""))


def _job(details: JobDetails) -> Job:
    ours = {name.removeprefix(METADATA): value for name, value in (details.metadata or {}).items()}
    attempt = None if "rayjob" in ours else re.search(r"-(\d+)$", details.submission_id or "")
    return Job(
        id=details.submission_id or details.job_id or "",
        status=details.status.value,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        recipe=ours.get("recipe", ""),
        output=ours.get("output", ""),
        attempt=int(attempt[1]) if attempt else 0,
        version=ours.get("version", ""),
        recipe_sha256=ours.get("recipe_sha256", ""),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )
