"""Rejects rows with images, videos or sound. These are not supported, and without them the text has another meaning."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

from dpo_ray.data.admission import Rejected

_NAME = re.compile(r"((chosen|rejected)_)?(image|video|audio)s?(_?(url|path|file|data|bytes|base64)s?)?", re.IGNORECASE)


@functools.lru_cache(maxsize=1024)  # each row of a file has the same names
def is_media(column: str) -> bool:
    """Return whether a column's name shows that the column holds images, videos or sound."""
    return _NAME.fullmatch(column) is not None


def check_media(row: Mapping[str, Any], used: Collection[str]) -> None:
    """Check that the row has no images, videos or sound.

    The columns in `used` are not checked: the recipe names them, so they hold text.

    Raises:
        Rejected: UNSUPPORTED_MEDIA, with the name of the column.
    """
    for name, value in row.items():
        if isinstance(name, str) and is_media(name) and name not in used and not _is_empty(value):
            raise Rejected("UNSUPPORTED_MEDIA", f"the row has `{name}`")


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    return value is None or value is False or (isinstance(value, str | list | tuple | bytes) and not value)
