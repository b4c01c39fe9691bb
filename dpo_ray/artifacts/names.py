"""Checks of the names of files, stages, keys and runs, so that no name leads out of its directory."""

from __future__ import annotations

import re

from dpo_ray.errors import ArtifactError

MANIFEST_NAME = "manifest.json"
STAGING_NAME = ".staging"  # stage names begin with a letter, so no artifact can have this name
TEMPORARY_PREFIX = ".tmp-"  # marks a file that is being written; readers and listings skip it

# Windows separators, NUL and other control characters, and characters that object-store clients read as patterns
# or versions.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\*?#\[\]]")
_STAGE = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_KEY = re.compile(r"[A-Za-z0-9_]{1,64}")  # no dash, so that "<stage>-<key>" splits in only one way
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def fault_in_name(name: str) -> str:
    """Return what is wrong with a relative file name, or an empty string if nothing is wrong."""
    if not name:
        return "is empty"
    if name.startswith("/"):
        return "is absolute"
    if _FORBIDDEN.search(name):
        return r"contains a control character or one of \ * ? # [ ]"
    parts = name.split("/")
    if ".." in parts or "." in parts:
        return "contains '.' or '..'"
    if "" in parts:
        return "has an empty part"
    if any(part.startswith(TEMPORARY_PREFIX) for part in parts):
        return f"has a part that starts with {TEMPORARY_PREFIX!r}, which marks unfinished files"
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        return "has a part longer than 255 bytes"
    return ""


def checked_name(name: str, where: str = "") -> str:
    """Return the file name unchanged; raise ArtifactError if it could lead out of its directory."""
    if fault := fault_in_name(name):
        raise ArtifactError(f"the name {name!r} {fault}", where=where, fix="use a plain relative name like a/b.parquet")
    return name


def artifact_name(stage: str, key: str) -> str:
    """Return the name of an artifact's directory, `<stage>-<key>`. Raises ArtifactError if stage or key is not valid."""
    if not _STAGE.fullmatch(stage):
        raise ArtifactError(f"the stage name {stage!r} is not a letter and up to 63 more of a-z, 0-9, '_' and '-'")
    if not _KEY.fullmatch(key):
        raise ArtifactError(f"the artifact key {key!r} is not 1 to 64 letters, digits and '_'")
    return f"{stage}-{key}"


def checked_run(run: str) -> str:
    """Return the run's name unchanged; raise ArtifactError if it cannot be the name of a directory."""
    if not _RUN.fullmatch(run):
        raise ArtifactError(
            f"the run name {run!r} is not a letter or digit and up to 127 more letters, digits, '.', '_' and '-'"
        )
    return run
