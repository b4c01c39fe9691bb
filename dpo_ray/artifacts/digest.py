"""Name things by their content: canonical JSON, sha256 of values and of files, artifact keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

KEY_HEX_CHARACTERS = 20  # 80 bits: no accidental collision among all the artifacts that anybody will ever have


def canonical_json(value: Any) -> bytes:
    """Write a value as the one JSON text that equal values share: sorted keys, no spaces, UTF-8.

    Tuples are written as lists. Raises ValueError for NaN and infinities, TypeError for keys that are no
    strings (JSON would write 1 and "1" alike) and for values that JSON does not know.
    """
    _refuse_other_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest(value: Any) -> str:
    """Hash a JSON value: sha256 of its canonical text, 64 hex characters."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file's bytes without holding it in memory, 64 hex characters."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_key(stage: str, stage_version: int, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Name the result of a stage before it is made: a hash of all that can change it, 20 hex characters.

    `config` is that stage's own section, `inputs` the keys or digests of what it reads, by role.
    The parts are hashed as one JSON object and not as joined strings, so no two sets of parts share a text.
    """
    parts = {"stage": stage, "stage_version": stage_version, "config": config, "inputs": inputs}
    return digest(parts)[:KEY_HEX_CHARACTERS]


def _refuse_other_keys(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"JSON keys are strings, not {type(key).__name__}: {key!r}")
            _refuse_other_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_other_keys(item)
