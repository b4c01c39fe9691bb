"""Removal of secrets from texts that are stored: passwords and signatures in URLs, and values of secret variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from dpo_ray.data.readers.locations import shown

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PG?PASS(WORD|WD|PHRASE)?|CREDENTIALS?|CONNECTION_STRING|\w*KEY)(_|$)", re.IGNORECASE
)
LEAST_CHARACTERS = 8  # shorter values are words such as `true`, which occur in any text
HIDDEN = "***"


def without_secrets(text: str, secrets: Sequence[str] = ()) -> str:
    """Return a text without passwords and signatures in URLs, and without these values."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return URL.sub(lambda found: shown(found[0]), text)


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the values of the environment variables whose names say that they hold secrets, the longest first."""
    values = {v for name, v in environment.items() if SECRET_NAME.search(name) and len(v) >= LEAST_CHARACTERS}
    return sorted(values, key=len, reverse=True)
