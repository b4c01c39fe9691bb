"""The state of a RayJob in words, the exit code of its driver, and the one error in the driver's last output."""

from __future__ import annotations

import re
from typing import NamedTuple

from dpo_ray.errors import EXIT_CODES, StoppedError
from dpo_ray.observe.text import harmless

from .client import Json

FINISHED = ("Complete", "Failed", "ValidationFailed")
FAILED_CODE = 9  # if the exit code of the run itself is not known
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LOGS = "last available logs"  # what Ray writes before the last ten lines of a driver
CAUSES = {
    "DeadlineExceeded": "it ran longer than cluster.kubernetes.deadline_seconds",
    "PreRunningDeadlineExceeded": "it did not start within cluster.kubernetes.start_deadline_seconds",
    "JobStatusCheckTimeoutExceeded": "the operator could not reach the head for five minutes",
    "JobDeploymentStatusTransitionGracePeriodExceeded": "the head ended before the operator read how the run ended",
}


class RunState(NamedTuple):
    """The status of a RayJob, as the KubeRay operator reports it."""

    deployment: str
    """Initializing, Running, Retrying, Suspended, Complete, Failed, ..."""

    job: str
    """The status of the Ray job: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; empty before the job exists."""

    failures: int
    message: str
    retries: int = 0
    job_id: str = ""
    cluster: str = ""

    @property
    def finished(self) -> bool:
        """Return True if the state is final. The state of a failed attempt that will be retried is not final."""
        return self.deployment in FINISHED

    @property
    def attempt_failed(self) -> bool:
        """Return True if an attempt has failed, whether or not another one follows."""
        return self.deployment in ("Retrying", "Failed", "ValidationFailed")

    @property
    def attempt(self) -> int:
        """Return the number of the attempt that runs or has just ended; the first is 1."""
        return max(1, self.failures + (0 if self.attempt_failed or self.finished else 1))

    @property
    def exit_code(self) -> int:
        """Return the exit code of a finished run: the driver's own code or, if Ray does not report it, 9."""
        if self.deployment == "Complete" and self.job == "SUCCEEDED":
            return 0
        if self.job == "STOPPED":
            return StoppedError.exit_code
        match = re.search(r"exit code (\d+)", self.message)
        return int(match[1]) if match and int(match[1]) else FAILED_CODE

    def __str__(self) -> str:
        attempt = f"attempt {self.attempt} of {self.retries + 1}" if self.retries else "its only attempt"
        if self.deployment == "Complete" and self.job == "SUCCEEDED":
            return "done"
        if self.job == "STOPPED":
            return "stopped; apply the recipe again to continue"
        if self.deployment == "Retrying":
            return f"{attempt} failed; the operator starts the next one on a new Ray cluster"
        words = {
            "": "waiting for the KubeRay operator",
            "Initializing": f"the pods start: {attempt}",
            "Suspending": "suspending: its pods end",
            "Suspended": "suspended: it has no pods",
            "Failed": f"failed, after {self.attempt} {'attempt' if self.attempt == 1 else 'attempts'}",
            "ValidationFailed": "the operator refuses it",
        }
        if self.deployment == "Running":
            return f"runs: {attempt}" if self.job == "RUNNING" else f"the driver starts: {attempt}"
        return words.get(self.deployment, self.deployment)


def state_of(ray_job: Json) -> RunState:
    """Return the state of a RayJob; `ray_job` is the RayJob as the API server returns it."""
    status, spec = ray_job.get("status") or {}, ray_job.get("spec") or {}
    reason = status.get("reason") or ""
    return RunState(
        status.get("jobDeploymentStatus") or "",
        status.get("jobStatus") or "",
        status.get("failed") or 0,
        status.get("message") or CAUSES.get(reason, reason),
        spec.get("backoffLimit") or 0,
        status.get("jobId") or "",
        status.get("rayClusterName") or "",
    )


def failure_of(state: RunState) -> list[str]:
    """Return how a failed attempt ended: the exit code in words, then the driver's one error and its advice."""
    _, logs, output = state.message.partition(LOGS)
    match = re.search(r"exit code (\d+)", state.message)
    if not match:
        first = state.message.strip().splitlines()
        return [harmless(first[0][:300])] if first else ["no reason is known"]
    code = int(match[1])
    meaning = EXIT_CODES.get(code, "the traceback in its log shows where" if code < 128 else "it was killed")
    return [f"exit code {code}: {meaning.rstrip('.')}", *(last_error(output.partition(":\n")[2]) if logs else [])]


def last_error(output: str) -> list[str]:
    """Return the lines of the last error in a driver's output: what is wrong, and what to do.

    If the driver wrote no error of its own, return the last line that has text, which ends a traceback.
    """
    lines = [harmless(COLOURS.sub("", line)).rstrip() for line in output.splitlines()]
    begins = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not begins:
        return [line for line in lines if line][-1:]
    error = lines[begins[-1] :]
    length = next((n for n, line in enumerate(error[1:], 1) if not line.startswith("  ")), len(error))
    return error[:length]
