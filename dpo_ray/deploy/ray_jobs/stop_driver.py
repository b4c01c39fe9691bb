"""A script that sends SIGTERM to the driver of one Ray job. The script runs on the head, as a job of its own.

It is uploaded as a single file, so it uses only the standard library. Ray's own way to stop a job is not used, because
it sends SIGKILL three seconds after SIGTERM, which is too soon for a checkpoint.

    python stop_driver.py SUBMISSION_ID         exit code 0: sent; 3: no such driver runs here
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

WAIT_SECONDS = 15  # for a driver that is still starting
POLL_SECONDS = 0.5
NOT_FOUND = 3


def driver_of(job: str) -> int | None:
    """Return the process id of a job's driver, or None.

    The driver runs `dpo_ray`, and Ray has put the job's name into its environment.
    """
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # the process has ended, or belongs to another user
            continue
        if _runs_a_recipe(words) and _job_of(variables) == job:
            return int(process.name)
    return None


def _runs_a_recipe(words: list[bytes]) -> bool:
    """Return whether this is the command line of a driver: `python -m dpo_ray run`, or the script `dpo-ray run`."""
    return words[1:4] == [b"-m", b"dpo_ray", b"run"] or (
        words[1:2] != [] and words[1].rpartition(b"/")[2] == b"dpo-ray" and words[2:3] == [b"run"]
    )


def _job_of(variables: list[bytes]) -> str | None:
    for variable in variables:
        name, _, value = variable.partition(b"=")
        if name == b"RAY_JOB_CONFIG_JSON_ENV_VAR":
            return json.loads(value).get("metadata", {}).get("job_submission_id")
    return None


def main(job: str) -> int:
    """Wait until the driver of a job exists, send it SIGTERM once, and return the exit code of this script."""
    until = time.monotonic() + WAIT_SECONDS
    while (pid := driver_of(job)) is None:
        if time.monotonic() > until:
            print(f"no driver of {job} is running here")
            return NOT_FOUND
        time.sleep(POLL_SECONDS)
    os.kill(pid, signal.SIGTERM)
    print(f"SIGTERM sent to process {pid}, the driver of {job}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
