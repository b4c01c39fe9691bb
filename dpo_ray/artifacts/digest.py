"""Hashes of content: canonical JSON, the sha256 of values and of files, and the keys of artifacts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

KEY_HEX_CHARACTERS = 20  # 80 bits: enough to rule out an accidental collision among any realistic number of artifacts


def canonical_json(value: Any) -> bytes:
    """Write a value as canonical JSON (sorted keys, no spaces, UTF-8), so that equal values give equal bytes.

    Tuples are written as lists. Raises ValueError for NaN and infinities. Raises TypeError for types that JSON does not
    have, and for keys that are not strings, because JSON would write the keys 1 and "1" in the same way.
    """
    _refuse_other_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON, as 64 hex characters."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, as 64 hex characters, without holding the whole file in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_key(stage: str, stage_version: int, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Return the key of a stage's result: a hash, as 20 hex characters, of everything that can change the result.

    The key is therefore known before the stage runs. `config` holds the settings of the stage. `inputs` maps the name
    of each input to the key or digest of the data that the stage reads. All values are hashed as one JSON object. If
    they were joined to one string, different values could give the same string.
    """
    parts = {"stage": stage, "stage_version": stage_version, "config": config, "inputs": inputs}
    return digest(parts)[:KEY_HEX_CHARACTERS]


def _refuse_other_keys(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key of the JSON data is not a string, but {type(key).__name__}: {key!r}")
            _refuse_other_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_other_keys(item)
