"""Remember the sha256 of large files, so that planning a run does not read the model's weights each time."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from dpo_ray.errors import DpoRayError

from .digest import file_sha256
from .storage import Storage

SMALL_BYTES = 4 << 20  # read again each time: cheaper than it is to remember


def cached_file_sha256(path: Path) -> str:
    """Return a file's sha256; for a large file that has not changed (path, size, times, inode) from the cache.

    The cache lies in $XDG_CACHE_HOME/dpo_ray/sha256 and may be deleted at any time.
    """
    path = path.resolve()
    stat = path.stat()
    if stat.st_size <= SMALL_BYTES:
        return file_sha256(path)
    identity = f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    name = hashlib.sha256(identity.encode()).hexdigest()
    cache = Storage(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_ray" / "sha256")
    if cache.exists(name):
        known = cache.read_bytes(name).decode()
        if len(known) == 64:
            return known
    digest = file_sha256(path)
    with suppress(DpoRayError):  # a home that cannot be written only means to read the file again next time
        cache.write(name, digest.encode())
    return digest
