"""A note in the run's directory that a retry cannot help, so that the next attempt of the same RayJob ends at once.

The KubeRay operator starts a failed RayJob again on a new cluster, whatever the error was. If the error would come again,
its driver leaves this note, and the next driver ends with the same error before it starts any work. A pod cannot read the
uid of its RayJob. So the note holds for RayJobs of the same name that `dpo-ray kubernetes apply` has marked alike, and,
because manifests that were applied by others have no mark, for no more attempts than the RayJob has retries.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dpo_ray import __version__, errors
from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import DpoRayError

from .job import DriverJob

FILE = "final-error.json"


def note_final_error(directory: Storage, job: DriverJob, recipe: Recipe, error: DpoRayError, attempt: int) -> None:
    """Write the note, if the RayJob has retries that the error would spend in vain."""
    if not (error.is_final and job.rayjob and job.retries):
        return
    about = {"attempt": attempt, "retries_left": job.retries}
    said = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    _write(directory, _identity(job, recipe) | about | {"exit_code": error.exit_code} | said)


def check_no_final_error(directory: Storage, job: DriverJob, recipe: Recipe) -> None:
    """Check that no earlier attempt of this RayJob has ended with an error that would come again.

    A note of another RayJob, of another recipe or of another version of dpo_ray is deleted.

    Raises:
        DpoRayError: the error of the earlier attempt.
    """
    try:
        note = json.loads(directory.read_bytes(FILE))
        left, attempt = int(note["retries_left"]), int(note["attempt"])
        error = _error(note)
        is_ours = all(note[name] == value for name, value in _identity(job, recipe).items())
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        is_ours, left, attempt, error = False, 0, 0, None
    if error is None or not is_ours or left <= 0:
        directory.delete(FILE)
        return
    if left == 1:  # the operator has no more retries: the next driver is that of a new RayJob
        directory.delete(FILE)
    else:
        _write(directory, note | {"retries_left": left - 1})
    error.fix = f"{error.fix}; attempt {attempt} has found this, and so this attempt was not made: apply the RayJob again".lstrip(
        "; "
    )
    raise error


def _identity(job: DriverJob, recipe: Recipe) -> dict[str, Any]:
    """Return what must be the same for an error to come again."""
    values = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    digest = hashlib.sha256(f"{job.recipe_sha256} {values}".encode()).hexdigest()
    return {"rayjob": job.rayjob, "applied": job.applied, "version": __version__, "recipe_sha256": digest}


def _error(note: dict[str, Any]) -> DpoRayError | None:
    kind = getattr(errors, str(note["kind"]), None)
    if not (isinstance(kind, type) and issubclass(kind, DpoRayError)):
        return None
    return kind(str(note["what"]), where=str(note["where"]), fix=str(note["fix"]))


def _write(directory: Storage, note: dict[str, Any]) -> None:
    directory.write(FILE, json.dumps(note, indent=1).encode())
