"""Names by content: canonical JSON, sha256 of values and of files, artifact keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

KEY_HEX_CHARACTERS = 20  # 80 bits: enough to rule out an accidental collision among any realistic number of artifacts


def canonical_json(value: Any) -> bytes:
    """Write a value as canonical JSON, so that equal values have equal bytes: sorted keys, no spaces, UTF-8.

    Tuples are written as lists. Raises ValueError for NaN and infinities, and TypeError for keys that are not
    strings (JSON would write 1 and "1" alike) and for values of types that JSON does not have.
    """
    _refuse_other_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value's canonical text, 64 hex characters."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, 64 hex characters, without holding the file in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_key(stage: str, stage_version: int, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Return the key of a stage's result before it is made: a hash of everything that can change it, 20 hex characters.

    `config` is the stage's own section; `inputs` maps each role to the key or digest of what the stage reads.
    The parts are hashed as one JSON object, not as joined strings, so two different sets of parts never share a text.
    """
    parts = {"stage": stage, "stage_version": stage_version, "config": config, "inputs": inputs}
    return digest(parts)[:KEY_HEX_CHARACTERS]


def _refuse_other_keys(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"JSON keys must be strings, not {type(key).__name__}: {key!r}")
            _refuse_other_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_other_keys(item)
