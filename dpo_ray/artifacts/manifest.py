"""Manifests, which list the files of an artifact. An artifact exists as soon as its manifest exists."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dpo_ray.errors import ArtifactError

from .digest import digest
from .names import fault_in_name

FORMAT = 1


def _relative(name: str) -> str:
    if fault := fault_in_name(name):
        raise ValueError(f"the name {name!r} {fault}")
    return name


RelativeName = Annotated[str, AfterValidator(_relative)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """One file of an artifact. Readers open it by `name`; its `path` is relative to the artifact's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: RelativeName
    path: RelativeName
    bytes: int = Field(ge=0)
    sha256: Sha256
    rows: int | None = Field(default=None, ge=0)


class Manifest(BaseModel):
    """The description of one committed artifact: its files, its inputs, and the run and the attempt that made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    stage: str
    stage_version: int
    key: str
    run: str
    attempt: str
    created_unix_seconds: float
    seconds: float
    files: tuple[FileEntry, ...]
    rows: dict[str, int]
    inputs: dict[str, str]
    config: dict[str, Any]
    figures: dict[str, Any]
    versions: dict[str, str]


def manifest_bytes(manifest: Manifest) -> bytes:
    """Write a manifest as JSON that people can read. The field `digest` holds the digest of all other fields.

    Raises ArtifactError if `config` or `figures` contain NaN, infinities or keys that are not strings, because JSON
    cannot represent these.
    """
    content = manifest.model_dump(mode="python")
    try:
        content["digest"] = digest(content)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"config or figures hold a value that JSON cannot represent: {error}",
            where=f"{manifest.stage}-{manifest.key}",
            fix="record finite numbers, strings, lists and dicts with string keys",
        ) from error
    return _text(content)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest and check its digest. Raises ArtifactError if even one bit of the manifest has changed."""
    fix = "delete the artifact's directory; its stage then runs again"
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        if isinstance(version := content.get("format"), int) and version > FORMAT:
            raise ArtifactError(
                f"the manifest has format {version}, which is newer than this version of dpo_ray supports",
                where=where,
                fix="upgrade dpo_ray",
            )
        # Compare the bytes and not only the values, so that a flipped bit never passes as another spelling of the
        # same value.
        if _text(content) != data or content.pop("digest", None) != digest(content):
            raise ValueError("its digest does not match its content")
        return Manifest.model_validate(content)
    except (ValueError, ValidationError, RecursionError) as error:
        raise ArtifactError(f"the manifest is damaged: {error}", where=where, fix=fix) from error


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
