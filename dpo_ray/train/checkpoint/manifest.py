"""The manifest that commits a training checkpoint. Old checkpoints are deleted, and damaged ones are moved away.

<place>/step-000000010.json                      the commit
<place>/step-000000010/attempt-000002/...        its files
<place>/damaged/step-000000010.json, .reason     a damaged checkpoint, and the reason
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from typing import Any

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError

from .claim import Claim
from .hashing import digest

logger = logging.getLogger(__name__)
_PREFIX = "step-"
_MANIFEST = re.compile(rf"{_PREFIX}([0-9]{{9,12}})\.json")
# Exceptions that are raised when JSON is damaged or a place cannot be read.
UNSOUND = (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, ArtifactError)


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint. Sorting the names sorts the steps."""
    return f"{_PREFIX}{step:09d}"


def committed_steps(place: Storage) -> list[int]:
    """List the steps that have a checkpoint, intact or damaged, oldest first."""
    found = (_MANIFEST.fullmatch(name) for name in place.list_files())  # any other file there is not a checkpoint
    return sorted(int(match[1]) for match in found if match)


def commit(place: Storage, directory: str, facts: dict[str, Any], digests: dict[str, str]) -> None:
    """Commit the files in `directory` as the checkpoint of the step `facts["step"]`, by writing its manifest.

    Args:
        facts: further fields of the manifest.
        digests: the digests that are already known, by file. The manifest lists all these files, even if this rank does
            not see a file that another rank wrote. All other files in `directory` are hashed here.
    """
    files = place.child(directory)
    own = {name: digest(files, name) for name in files.list_files() if name not in digests}
    manifest = facts | {"directory": directory, "files": dict(sorted((digests | own).items()))}
    manifest["digest"] = _manifest_digest(manifest)
    place.write(f"{step_name(facts['step'])}.json", json.dumps(manifest, indent=1).encode())


def read_manifest(place: Storage, step: int, identity: str) -> dict[str, Any]:
    """Return the manifest of a step's checkpoint. This checks the manifest, but not the files that it lists.

    Raises:
        ArtifactError: the manifest is damaged, or its checkpoint was written for another configuration (`identity`).
    """
    name = f"{step_name(step)}.json"
    try:
        manifest = json.loads(place.read_bytes(name))
        if manifest.pop("digest") != _manifest_digest(manifest):
            raise ValueError("the manifest's digest does not match its content")
        if manifest["step"] != step:
            raise ValueError(f"the manifest is of step {manifest['step']}")
        if manifest["identity"] != identity:
            raise ValueError("the checkpoint belongs to another configuration")
    except UNSOUND as error:
        raise ArtifactError(reason_of(error), where=place.full_path(name)) from error
    return manifest


def reason_of(error: BaseException) -> str:
    """Return the text of an error: only what is wrong, without the location and the fix."""
    return error.what if isinstance(error, ArtifactError) else str(error) or repr(error)


def set_aside(place: Storage, name: str, reason: str) -> None:
    """Move a manifest to `damaged/`, and write the reason next to it. After that the checkpoint is ignored."""
    place.write(f"damaged/{name}.reason", reason.encode())
    try:
        place.write(f"damaged/{name}.json", place.read_bytes(f"{name}.json"))
        place.delete(f"{name}.json")
    except ArtifactError as error:
        logger.warning("the manifest of the damaged checkpoint cannot be moved: %s", error)


def prune(place: Storage, keep: int, claim: Claim) -> None:
    """Delete old checkpoints. Keep the newest `keep`, and the best checkpoints to which their manifests refer.

    Files that may be incomplete, because they are still being written, are kept as well: files of steps later than the
    first of the newest `keep`, and files of groups of workers that are newer than `claim`.
    """
    steps = committed_steps(place)
    newest = steps[-keep:]
    kept = {*newest, *(best for step in newest if (best := _best_step(place, step)) is not None)}
    for step in steps:
        if step not in kept:
            place.delete(f"{step_name(step)}.json")
    names = {step_name(step) for step in kept}
    for directory in place.list_dirs():
        if directory.startswith(_PREFIX) and directory < step_name(newest[0]) and directory not in names:
            attempts = place.list_dirs(directory)
            for attempt in filter(claim.covers, attempts):
                place.delete_tree(f"{directory}/{attempt}")
            if all(map(claim.covers, attempts)):
                place.delete_tree(directory)


def _best_step(place: Storage, step: int) -> int | None:
    try:
        best = json.loads(place.read_bytes(f"{step_name(step)}.json"))["best"]
        return None if best is None else int(best["step"])
    except UNSOUND:
        return None  # the manifest is damaged: it is moved to `damaged/` if it is to be loaded


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
